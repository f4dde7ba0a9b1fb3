"""Starts processes, passes their output on line by line, and ends all of them when one fails or a signal says so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Protocol

from polyaccel.launch.guarding import Guardian
from polyaccel.signals import PASSED_ON, Recipient

_POLL_S = 0.02
_OBSERVE_S = 0.05
_KEPT_LINES = 200  # of every process's stderr, to show a failed one's traceback at the end


@dataclass(frozen=True, slots=True)
class Worker:
    """One process to start: the name in front of its lines, its argument list, and its environment (None: this one's)."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None


class Peers(Protocol):
    """The other machines of a job, as seen by those who look after the workers of this one."""

    @property
    def is_stopped(self) -> bool:
        """Whether the workers are to end because of something elsewhere."""
        ...

    def failed(self, name: str, code: int) -> None:
        """The worker of this name has failed first; the others are about to be stopped."""
        ...


def supervise(
    workers: Sequence[Worker], *, grace_s: float, stop: StopRequest | None = None, peers: Peers | None = None
) -> int:
    """Run all workers to their end; returns 0, or the exit code of the first that failed (128 + N when signal N killed it).

    When one fails the others get SIGTERM, and after `grace_s` seconds SIGKILL (jax.distributed ignores SIGTERM). Signals that
    this process receives are passed on; after SIGTERM and SIGINT all workers have `grace_s` seconds to leave as they like, and
    nobody sends them a second one. With several workers, lines of output are prefixed by the worker's name, and the traceback
    of the first that failed is shown again at the end. A single worker keeps the terminal itself, for progress bars and debuggers.
    Where this process is killed, its workers and what they started are killed too.

    `stop` listens for signals already, where several calls are one job; without it this call listens by itself. `peers`: the workers
    are a part of a job; they end with it, it is told of a failure at once, and says itself what has failed.
    """
    if stop is None:
        with StopRequest() as stop:
            return supervise(workers, grace_s=grace_s, stop=stop, peers=peers)
    running: list[_Running] = []
    first: tuple[_Running, int] | None = None
    with Guardian() as guardian:
        try:
            for worker in workers:
                if stop.is_set:
                    break
                running.append(_Running(worker, guardian, prefixed=len(workers) > 1, patience_s=grace_s / 3))
            first = _wait(running, stop, grace_s, peers)
            if first is not None and peers is not None:
                peers.failed(first[0].worker.name, first[1])
        finally:
            _end(running, stop, grace_s)
    if first is None:
        return stop.code if len(running) < len(workers) else 0
    failed, code = first
    if len(workers) > 1 and not stop.is_set:
        of = "" if peers is not None else f" of {len(workers)}"
        print(f"polyaccel launch: process {failed.worker.name}{of} failed with exit code {code}", file=sys.stderr)
        if failed.traceback:
            print(failed.traceback, file=sys.stderr)
    return code


class StopRequest:
    """Notes the signals that reach this process while its `with` block runs, to be passed on to the workers of the moment. SIGHUP, of a
    terminal that has gone, counts as SIGTERM.

    `ends_process` says that this process exits after the block: the signals are ignored from then on, since the exit code is
    settled, and a late one would change it. Elsewhere than on the main thread nothing is noted.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._number: int | None = None  # of the first SIGTERM or SIGINT
        self._since = 0.0
        self._arrived: deque[int] = deque()
        self._unannounced: deque[int] = deque()
        self.on_arrival: Callable[[int], None] | None = (
            None  # hears of every signal to this process, on the main thread
        )
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in PASSED_ON:
                self._before[number] = signal.signal(number, self._note)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
                self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._ends_process else handler)

    @property
    def is_set(self) -> bool:
        """True once SIGTERM or SIGINT came."""
        return self._number is not None

    @property
    def code(self) -> int:
        """The exit code of a job that was stopped before it had processes."""
        return 128 + (self._number or 0)

    def is_overdue(self, grace_s: float) -> bool:
        """True when the workers have had their time to end."""
        return self._number is not None and time.monotonic() - self._since > grace_s

    def pass_on(self, workers: Sequence[_Running]) -> None:
        """Send what has arrived to these workers, which must be all of them."""
        self.announce()
        while self._arrived:
            number = signal.Signals(self._arrived.popleft())
            for worker in workers:
                worker.send(number)

    def announce(self) -> None:
        """Tell `on_arrival` what has come to this process."""
        while self._unannounced:
            number = self._unannounced.popleft()
            if self.on_arrival is not None:
                self.on_arrival(number)

    def deliver(self, number: int) -> None:
        """A signal that came to another machine of the job. May be called on any thread."""
        if number != signal.SIGUSR1 and self._number is None:
            self._since = time.monotonic()
            self._number = number
        self._arrived.append(number)

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or as soon as the job is to stop."""
        deadline = time.monotonic() + seconds
        while not self.is_set and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A terminal or an ssh connection that has gone: scripts know that they are to leave by SIGTERM.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        # Nothing is sent from here: a worker that is being started would be left out.
        self._unannounced.append(number)
        self.deliver(number)


class _Running:
    """A started worker and the threads that pass its output on."""

    def __init__(self, worker: Worker, guardian: Guardian, *, prefixed: bool, patience_s: float) -> None:
        self.worker = worker
        self._guardian = guardian
        self._tail: deque[str] = deque(maxlen=_KEPT_LINES)
        pipe = subprocess.PIPE if prefixed else None
        # A session of its own: a signal to our process group reaches it once, passed on by us, and at the very end its
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
        guardian.watch(self.process.pid, with_group=self._has_session)
        self._recipient = Recipient(self.process.pid, patience_s)
        self._observed = 0.0
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

    def attend(self) -> None:
        """While it runs: see which signals it handles, and send what was put off."""
        now = time.monotonic()
        if now - self._observed >= _OBSERVE_S:
            self._observed = now
            self._recipient.observe()
            self._recipient.send_due()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker itself. Its own children are its own business: a loader worker may be needed to save."""
        if number == signal.SIGINT and not self._has_session:
            return  # the terminal has sent it
        if self.process.poll() is None:
            self._recipient.send(number)

    def end(self) -> None:
        """Ask the worker to end, unless it was asked."""
        if not self._recipient.was_sent(signal.SIGTERM):
            self.send(signal.SIGTERM)

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
        self._guardian.forget(self.process.pid)
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
            try:
                target.write(prefix + (line if line.endswith("\n") else line + "\n"))
                target.flush()
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                # The terminal has gone: a worker that saves before it leaves must not fail at what it prints.


def _wait(
    running: Sequence[_Running], stop: StopRequest, grace_s: float, peers: Peers | None
) -> tuple[_Running, int] | None:
    """The first worker that failed, once it is known; after a request to stop, once all have left or their time is over."""
    left = list(running)
    first: tuple[_Running, int] | None = None
    while left:
        stop.pass_on(left)
        for worker in list(left):
            code = worker.code()
            if code is None:
                worker.attend()
                continue
            left.remove(worker)
            first = first or ((worker, code) if code else None)
        if first is not None and not stop.is_set:
            # A signal to every process of the job may be what it left for, and reach us a moment later.
            stop.wait(2 * _POLL_S)
            if not stop.is_set:
                return first
        if peers is not None and peers.is_stopped and not stop.is_set:
            return None
        if left and stop.is_overdue(grace_s):
            return first or (left[0], 128 + signal.SIGKILL)
        time.sleep(_POLL_S)
    return first


def _end(running: Sequence[_Running], stop: StopRequest, grace_s: float) -> None:
    for worker in running:
        worker.end()
    deadline = time.monotonic() + grace_s
    while any(worker.code() is None for worker in running) and time.monotonic() < deadline:
        if stop.is_overdue(grace_s):
            break
        for worker in running:
            if worker.code() is None:
                worker.attend()
        time.sleep(_POLL_S)
    for worker in running:
        worker.kill()
