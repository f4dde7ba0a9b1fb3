"""One machine's seat in the meeting of a job's launchers: it says how its processes fare, and hears what to do with them."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from polyaccel.errors import LaunchError
from polyaccel.launch.supervision import StopRequest
from polyaccel.launch.wires import VERSION, Wire
from polyaccel.signals import PASSED_ON

_ROUND_S = 0.1
_POLL_S = 0.02
_RETRY_S = 0.2
_ANSWER_S = 10.0
_WORRIED_S = 5.0
_GOODBYE_S = 1.0


class Membership:
    """Use as a context: leaving it leaves the meeting. `address`: this machine's own, by which machine 0 sees it. `welcome`: what machine 0
    said of itself and of the job. `max_restarts` is the job's.

    It is what `supervise` asks between two looks at the processes: see `supervision.Peers`.
    """

    def __init__(
        self,
        wire: Wire,
        address: str,
        stop: StopRequest,
        welcome: dict[str, Any],
        heard: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.address = address
        self.max_restarts = int(welcome["max_restarts"])
        self._leader = f"machine 0 ({welcome['host']})"
        self._wire = wire
        self._stop = stop
        self._orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._attempt = -1
        self._stopped = -1  # the newest attempt that is to end
        self.has_failed = False  # whether a failure of this attempt was reported here
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="membership", daemon=True)
        for message in heard:
            self._take(message)

    def __enter__(self) -> Membership:
        self._stop.on_arrival = self._announce
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.on_arrival = None
        if error is not None:
            self._wire.send(type="leave", why=f"its launcher has ended with {type(error).__name__}")
        deadline = time.monotonic() + _GOODBYE_S
        while not self._wire.flushed() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._is_closed.set()
        self._thread.join(2 * _ROUND_S)
        self._wire.close()

    def next_order(self) -> dict[str, Any]:
        """What to do next: `start`, `restart`, `wait`, `finish`, or `lost` where machine 0 is. Waits for it."""
        while True:
            self._stop.announce()
            try:
                order = self._orders.get(timeout=_POLL_S)
            except Empty:
                continue
            if order["type"] == "start":
                self._attempt, self.has_failed = int(order["attempt"]), False
            return order

    @property
    def is_stopped(self) -> bool:
        """Whether this attempt ends on all machines."""
        return self._stopped >= self._attempt

    def failed(self, name: str, code: int) -> None:
        """Say that a process has failed here."""
        self.has_failed = True
        self._wire.send(type="failed", attempt=self._attempt, process=int(name), code=code)

    def ended(self) -> None:
        """Say that none of this attempt's processes is left here."""
        self._wire.send(type="ended", attempt=self._attempt)

    def _announce(self, number: int) -> None:
        self._wire.send(type="signalled", number=number)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.connection, selectors.EVENT_READ)
            try:
                while not self._is_closed.is_set():
                    if selector.select(_ROUND_S):
                        for message in self._wire.receive():
                            self._take(message)
                    self._wire.beat()
            except ConnectionError as error:
                self._stopped = sys.maxsize
                self._orders.put({"type": "lost", "words": f"{self._leader} is lost: {error}"})

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "signal" and message["number"] in PASSED_ON:
            self._stop.deliver(message["number"])
        elif kind == "stop":
            print(f"polyaccel launch: {message['words']}: the processes here are stopped", file=sys.stderr)
            self._stopped = int(message["attempt"])
        elif kind in ("start", "restart", "wait", "finish"):
            self._orders.put(message)


def join(
    address: str, port: int, hello: dict[str, Any], *, timeout_s: float, silence_s: float, stop: StopRequest
) -> Membership | None:
    """Find machine 0, which may start later, and be admitted. None where a signal came first.

    Raises LaunchError where machine 0 does not answer within `timeout_s`, and where it refuses this machine.
    """
    began = time.monotonic()
    has_worried = False
    while not stop.is_set:
        try:
            wire, own = _connected(address, port, silence_s)
            return Membership(wire, own, stop, *_admitted(wire, hello))
        except OSError as error:
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise LaunchError(
                    f"machine {hello['rank']} did not reach machine 0 at {address}:{port} within {timeout_s:g} s"
                    f" (join_timeout_s): {error}",
                    "start `polyaccel launch --machine-rank 0` there with the same --main-process-port, and let the port through",
                ) from error
            if waited_s > _WORRIED_S and not has_worried:
                has_worried = True
                print(f"polyaccel launch: waiting for machine 0 at {address}:{port} ({error})", file=sys.stderr)
            stop.wait(_RETRY_S)
    return None


def greeting(rank: int, *, num_machines: int, num_processes: int, backend: str) -> dict[str, Any]:
    """What a machine says of itself when it comes."""
    return {
        "version": VERSION,
        "rank": rank,
        "host": os.uname().nodename,
        "num_machines": num_machines,
        "num_processes": num_processes,
        "backend": backend,
    }


def _connected(address: str, port: int, silence_s: float) -> tuple[Wire, str]:
    connection = socket.create_connection((address, port), timeout=_ANSWER_S)
    return Wire(connection, silence_s), str(connection.getsockname()[0])


def _admitted(wire: Wire, hello: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Say hello and await the welcome; returns it and what else was said. Raises OSError without an answer, LaunchError where refused."""
    wire.send(type="hello", **hello)
    deadline = time.monotonic() + _ANSWER_S
    try:
        while time.monotonic() < deadline:
            messages = wire.receive()
            if not messages:
                time.sleep(_POLL_S)
                continue
            answer, *others = messages
            if answer["type"] == "refused":
                raise LaunchError(
                    f"machine 0 refuses machine {hello['rank']}: {answer['words']}",
                    "start `polyaccel launch` with the same settings on every machine, each with its own --machine-rank",
                )
            if answer["type"] == "welcome":
                wire.silence_s = float(answer["heartbeat_timeout_s"])
                return answer, others
            raise ConnectionError("it does not talk like a launcher")
        raise TimeoutError("it does not answer")
    except BaseException:
        wire.close()
        raise
