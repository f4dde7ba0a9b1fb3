"""Starts processes, passes their output on line by line, and ends all of them when one fails or a signal says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

_POLL_S = 0.02
_KEPT_LINES = 200  # of every process's stderr, to show a failed one's traceback at the end
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Worker:
    """One process to start: the name in front of its lines, its argument list, and its environment (None: this one's)."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None


def supervise(workers: Sequence[Worker], *, grace_s: float, stop: StopRequest | None = None) -> int:
    """Run all workers to their end; returns 0, or the exit code of the first that failed (128 + N when signal N killed it).

    When one fails the others get SIGTERM, and after `grace_s` seconds SIGKILL (jax.distributed ignores SIGTERM). Signals that
    this process receives are passed on; SIGTERM and SIGINT start the same countdown. With several workers, lines of output are
    prefixed by the worker's name, and the traceback of the first that failed is shown again at the end. A single worker keeps
    the terminal itself, for progress bars and debuggers.
    """
    stop = stop or StopRequest()
    running: list[_Running] = []
    first: tuple[_Running, int] | None = None
    with stop.forwarding_to(running):
        try:
            running += [_Running(worker, prefixed=len(workers) > 1) for worker in workers]
            first = _wait(running, stop, grace_s)
        finally:
            _end(running, grace_s)
    if first is None:
        return 0
    failed, code = first
    if len(workers) > 1 and not stop.is_set:
        print(
            f"polyaccel launch: process {failed.worker.name} of {len(workers)} failed with exit code {code}",
            file=sys.stderr,
        )
        if failed.traceback:
            print(failed.traceback, file=sys.stderr)
    return code


class StopRequest:
    """Whether this process was asked to stop, and since when; passes signals on to the workers of the moment."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._workers: list[_Running] = []

    @property
    def is_set(self) -> bool:
        """True once SIGTERM or SIGINT came."""
        return self._since is not None

    def is_overdue(self, grace_s: float) -> bool:
        """True when the workers have had their time to end."""
        return self._since is not None and time.monotonic() - self._since > grace_s

    def forwarding_to(self, workers: list[_Running]) -> _Signals:
        """A context in which signals go to these workers, which may still be added to."""
        self._workers = workers
        return _Signals(self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and self._since is None:
            self._since = time.monotonic()
        for worker in self._workers:
            worker.send(signal.Signals(number))


class _Running:
    """A started worker and the threads that pass its output on."""

    def __init__(self, worker: Worker, *, prefixed: bool) -> None:
        self.worker = worker
        self._tail: deque[str] = deque(maxlen=_KEPT_LINES)
        pipe = subprocess.PIPE if prefixed else None
        # A session of its own: a signal to our process group (Slurm) reaches it once, passed on by us, and at the very end its
        # children (data loader workers) can be ended with it. On a terminal, a single worker stays in the foreground with us.
        self._has_session = prefixed or sys.stdin is None or not sys.stdin.isatty()
        self.process = subprocess.Popen(
            list(worker.arguments),
            env=None if worker.environment is None else dict(worker.environment),
            stdin=subprocess.DEVNULL if prefixed else None,
            stdout=pipe,
            stderr=pipe,
            start_new_session=self._has_session,
        )
        self._threads = []
        if prefixed:
            for source, target, kept in (
                (self.process.stdout, sys.stdout, None),
                (self.process.stderr, sys.stderr, self._tail),
            ):
                thread = threading.Thread(
                    target=_pass_on, args=(source, target, f"[{worker.name}] ", kept), daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def code(self) -> int | None:
        """The exit code as a shell tells it, or None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker itself. Its own children are its own business: a loader worker may be needed to save."""
        if number == signal.SIGINT and not self._has_session:
            return  # the terminal has sent it
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the worker and what it started."""
        try:
            if self._has_session:
                os.killpg(self.process.pid, signal.SIGKILL)
            elif self.process.poll() is None:
                self.process.kill()
        except ProcessLookupError:
            pass  # all of them are gone
        self.process.wait()
        for thread in self._threads:
            thread.join(1.0)

    @property
    def traceback(self) -> str:
        """The last Python traceback that the worker printed, or its last lines."""
        for thread in self._threads:
            thread.join(1.0)
        lines = list(self._tail)
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        return "".join(lines[starts[-1] :] if starts else lines[-20:]).rstrip()


def _pass_on(source: IO[bytes], target: IO[str], prefix: str, kept: deque[str] | None) -> None:
    with source:
        for raw in source:
            line = raw.decode(errors="replace")
            if kept is not None:
                kept.append(line)
            # One write per line: two processes' lines may alternate, but never mix.
            target.write(prefix + (line if line.endswith("\n") else line + "\n"))
            target.flush()


def _wait(running: Sequence[_Running], stop: StopRequest, grace_s: float) -> tuple[_Running, int] | None:
    left = list(running)
    while left:
        for worker in list(left):
            code = worker.code()
            if code:
                return worker, code
            if code == 0:
                left.remove(worker)
        if stop.is_overdue(grace_s):
            return left[0], 128 + signal.SIGKILL
        time.sleep(_POLL_S)
    return None


def _end(running: Sequence[_Running], grace_s: float) -> None:
    for worker in running:
        worker.send(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(worker.code() is None for worker in running) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for worker in running:
        worker.kill()


class _Signals:
    """A context in which a handler has the forwarded signals; elsewhere than on the main thread it does nothing."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in FORWARDED:
                self._before[number] = signal.signal(number, self._handler)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
