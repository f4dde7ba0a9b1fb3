"""Where the launchers of a job's machines meet: machine 0 listens, on a thread, and tells them what its `Leader` decides."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from polyaccel.errors import LaunchError
from polyaccel.launch.leading import Leader, Machine, Rules
from polyaccel.launch.wires import VERSION, Wire

_ROUND_S = 0.1
_GOODBYE_S = 3.0
_GREETING_S = 10.0  # for a newcomer to say who it is
_PORTS_TRIED = 100


class Meeting:
    """Machine 0's server. Use as a context: leaving it closes all connections.

    Args:
        address, port: where the machines look for machine 0. Where the address is none of this machine's own (a forwarded one), all of
            its addresses are listened on.
        rules: the job's settings.
        backend: the engine, which must be the same everywhere.
        heartbeat_timeout_s: after so many seconds of silence a machine is lost.

    Raises LaunchError where nothing can listen there.
    """

    def __init__(self, address: str, port: int, rules: Rules, *, backend: str, heartbeat_timeout_s: float) -> None:
        self._rules, self._backend, self._silence_s = rules, backend, heartbeat_timeout_s
        self._port = self._given = port
        self._listener = _listen(address, port)
        self._leader = Leader(rules, choose_port=self._free_port, now=time.monotonic())
        self._unknown: dict[Wire, float] = {}  # that have not said who they are, and since when
        self._wires: dict[int, Wire] = {}
        self._is_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meeting", daemon=True)

    def __enter__(self) -> Meeting:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._is_left.set()
        self._thread.join(_GOODBYE_S + 2 * _ROUND_S)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._leader.is_over and not self._is_left.is_set():
                for key, _ in selector.select(_ROUND_S):
                    if key.data is None:
                        self._greet(selector)
                    else:
                        self._hear(selector, key.data)
                self._look(selector)
                self._leader.tick(time.monotonic())
                self._deliver()
            self._say_goodbye()

    def _greet(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        wire = Wire(connection, self._silence_s)
        self._unknown[wire] = time.monotonic()
        selector.register(connection, selectors.EVENT_READ, wire)

    def _hear(self, selector: selectors.BaseSelector, wire: Wire) -> None:
        try:
            for message in wire.receive():
                self._take(wire, message)
        except ConnectionError as error:
            self._drop(selector, wire, str(error))
        except (KeyError, TypeError, ValueError):
            self._drop(selector, wire, "it does not talk like a launcher")

    def _take(self, wire: Wire, message: dict[str, Any]) -> None:
        kind, now = message["type"], time.monotonic()
        if kind == "hello":
            self._admit(wire, message, now)
            return
        rank = next((rank for rank, known in self._wires.items() if known is wire), None)
        if rank is None:
            return  # replaced by a newer launcher of its machine
        if kind == "failed":
            self._leader.failed(rank, int(message["attempt"]), int(message["process"]), int(message["code"]))
        elif kind == "ended":
            self._leader.ended(rank, int(message["attempt"]), now)
        elif kind == "signalled":
            self._leader.signalled(rank, int(message["number"]))
        elif kind == "leave":
            raise ConnectionError(str(message["why"]))

    def _admit(self, wire: Wire, hello: dict[str, Any], now: float) -> None:
        rank = int(hello["rank"])
        ours = {"version": VERSION, "num_machines": self._rules.num_machines, "backend": self._backend}
        different = [
            f"{name} is {hello.get(name)!r} there and {here!r} on machine 0"
            for name, here in ours.items()
            if hello.get(name) != here
        ]
        if not 0 <= rank < self._rules.num_machines:
            different = [f"machine_rank {rank} is outside a job of {self._rules.num_machines} machines"]
        if different:
            wire.send(type="refused", words="; ".join(different))
            return
        self._unknown.pop(wire, None)
        machine = Machine(rank, str(hello["host"]), int(hello["num_processes"]))
        self._leader.joined(machine, now) if rank not in self._wires else self._replace(machine, now)
        self._wires[rank] = wire
        wire.send(
            type="welcome",
            host=os.uname().nodename,
            heartbeat_timeout_s=self._silence_s,
            max_restarts=self._rules.max_restarts,
        )

    def _replace(self, machine: Machine, now: float) -> None:
        self._wires.pop(machine.rank)  # nothing is for its old launcher any more
        self._leader.joined(machine, now)

    def _look(self, selector: selectors.BaseSelector) -> None:
        """Give signs of life, and miss those of the others."""
        for wire in [*self._wires.values(), *self._unknown]:
            try:
                wire.beat()
            except ConnectionError as error:
                self._drop(selector, wire, str(error))
        now = time.monotonic()
        for wire in [wire for wire, since in self._unknown.items() if now - since > _GREETING_S]:
            self._drop(selector, wire, "it said nothing")

    def _drop(self, selector: selectors.BaseSelector, wire: Wire, why: str) -> None:
        self._unknown.pop(wire, None)
        with suppress(KeyError, ValueError):
            selector.unregister(wire.connection)
        wire.close()
        for rank in [rank for rank, known in self._wires.items() if known is wire]:
            del self._wires[rank]
            self._leader.lost(rank, why, time.monotonic())

    def _deliver(self) -> None:
        while self._leader.outbox:
            rank, message = self._leader.outbox.popleft()
            if rank in self._wires:
                self._wires[rank].send(**message)

    def _say_goodbye(self) -> None:
        self._deliver()
        deadline = time.monotonic() + _GOODBYE_S
        while not all(wire.flushed() for wire in self._wires.values()) and time.monotonic() < deadline:
            time.sleep(_ROUND_S / 5)
        for wire in [*self._wires.values(), *self._unknown]:
            with suppress(OSError):
                wire.connection.shutdown(socket.SHUT_WR)
            wire.close()

    def _free_port(self, attempt: int) -> int:
        """The port of an attempt: a new one each time, since the last one's may still be held."""
        first = max(self._port + 1 + attempt, self._given + 1)
        for port in range(first, first + _PORTS_TRIED):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                self._given = port
                return port
        return first  # the processes will say what is wrong with it


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(where[0]), port), family=family)
    except OSError as error:
        if not isinstance(error, socket.gaierror) and error.errno != errno.EADDRNOTAVAIL:
            raise LaunchError(
                f"machine 0 cannot listen at {address}:{port}: {error.strerror or error}",
                "choose another --main-process-port, the same on every machine",
            ) from error
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise LaunchError(
            f"machine 0 cannot listen on port {port}: {error.strerror or error}",
            "choose another --main-process-port, the same on every machine",
        ) from error
