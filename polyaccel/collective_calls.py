"""What this process does together with the others of its job, told to them as soon as one of them waits.

A wait for a process that cannot come ends early, and every wait ends at a deadline; the error says where each process is. Nothing is
exchanged as long as nobody waits: the others answer from a thread of theirs, which looks once a second whether somebody asks.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType

from polyaccel.errors import CollectiveError
from polyaccel.store import Store

LOOK_S = 0.5  # a process that waits looks this often where the others are; its engine calls `look`
_ANSWER_S = 1.0  # a process that does not wait looks this often whether it is asked
_PROCESSES_PER_S = 256  # that look at the store; in a larger job each looks less often
_STUCK_S = 10.0  # processes that wait for each other at different places get no further in this time

# Between the line of a script and an operation: these packages stand for the script, not for themselves.
_PASSED = frozenset({"contextlib", "functools", "logging", "torch", "torchdata", "jax", "flax", "importlib", "runpy"})
_numbers = itertools.count()  # of the jobs that this process has been in, equal on all processes
log = logging.getLogger("polyaccel.collective_calls")


@dataclass(frozen=True, slots=True)
class Call:
    """One operation between processes: what the script called and where, and what must be equal on all processes."""

    name: str
    place: str
    operation: str
    detail: str = ""

    def fits(self, other: Call) -> bool:
        """Whether two processes are at the same operation. The lines of the script may differ."""
        return (self.name, self.operation, self.detail) == (other.name, other.operation, other.detail)

    def __str__(self) -> str:
        return f"{self.name} at {self.place}"


@dataclass(frozen=True, slots=True)
class _Report:
    """What a process says of itself: operations begun and completed, exchanges of training begun since the last one that is completed,
    where it is, how it has ended."""

    begun: int
    completed: int
    exchanges: int
    call: Call | None
    at: str
    end: str

    def text(self) -> str:
        call = None if self.call is None else [self.call.name, self.call.place, self.call.operation, self.call.detail]
        return json.dumps([self.begun, self.completed, self.exchanges, call, self.at, self.end])

    @classmethod
    def of(cls, text: str) -> _Report:
        begun, completed, exchanges, call, at, end = json.loads(text)
        return cls(begun, completed, exchanges, call and Call(*call), at, end)


class CollectiveCalls:
    """The operations of one process, in the order in which every process of the job calls them.

    Args:
        process_index, num_processes: this process in its job.
        timeout_s: how long an operation waits for the other processes.
        open_store: gives a connection to the job's store; None in a job of one process.
        num_exchanges: how many exchanges of its own (gradients, averages) training has begun here: it grows alike on all processes.
            Called on any thread.

    An engine calls `with calls(operation, detail)` around each operation, and inside, while it waits, `look()` every LOOK_S seconds, on
    the thread that waits. What `look` raises ends the operation, and with it the job's common path: `is_broken` is True from then on.
    """

    def __init__(
        self,
        process_index: int = 0,
        num_processes: int = 1,
        *,
        timeout_s: float = 1800.0,
        open_store: Callable[[], Store] | None = None,
        num_exchanges: Callable[[], int] = lambda: 0,
    ) -> None:
        self.timeout_s = timeout_s
        self.is_broken = False
        self._process_index = process_index
        self._num_processes = num_processes
        self._open_store = open_store
        self._num_exchanges = num_exchanges
        self._prefix = f"polyaccel.collective_calls/{next(_numbers)}"
        self._begun = self._completed = self._num_looks = 0
        self._exchanges_before = num_exchanges()
        self._call: Call | None = None
        self._since = 0.0
        self._user_thread = threading.get_ident()
        self._store: Store | None = None
        self._elsewhere: dict[int, tuple[_Report, float]] = {}  # where a process was first seen, and when
        self._is_closed = threading.Event()
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        if num_processes > 1 and open_store is not None:
            self._start(open_store)

    # -- around an operation -----------------------------------------------------------------------------------------------

    def __call__(self, operation: str, detail: str = "") -> CollectiveCalls:
        """Begin an operation; leaving the context completes it."""
        frame = sys._getframe(1)
        name, place = call_site(frame, _package(frame))
        self._call = Call(name or operation, place, operation, detail)
        self._begun += 1
        self._since = time.monotonic()
        self._user_thread = threading.get_ident()
        return self

    @property
    def call(self) -> Call:
        """The operation that was begun last."""
        assert self._call is not None, "an operation has begun"
        return self._call

    def __enter__(self) -> Call:
        return self.call

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.is_broken:
            self._completed, self._exchanges_before = self._begun, self._num_exchanges()

    def look(self) -> None:
        """Where the others are. Raises CollectiveError where waiting for them is in vain, or has lasted for `timeout_s`."""
        reports = self._reports()
        problem = self._problem(reports)
        if problem is None and time.monotonic() - self._since >= self.timeout_s:
            problem = self._too_late(reports)
        if problem is not None:
            self.is_broken = True
            raise CollectiveError(*problem)

    def failed(self, error: BaseException) -> CollectiveError:
        """What to raise where an operation failed because another process has gone: with the reason, if that one gave it."""
        deadline = time.monotonic() + 2 * _ANSWER_S
        self.is_broken = True
        while time.monotonic() < deadline:
            problem = self._problem(self._reports())
            if problem is not None:
                return CollectiveError(*problem)
            time.sleep(LOOK_S / 5)
        return CollectiveError(
            f"{self.call} failed between the processes: {error}",
            "look for an earlier error in the output of the other processes",
        )

    def _problem(self, reports: dict[int, _Report | None]) -> tuple[str, str] | None:
        """Why an operation can never complete, in words and with a hint; None while it can."""
        call, mine = self.call, self._report()
        for index, other in reports.items():
            if other is None:
                continue
            if other.end and other.completed < self._begun:
                return (
                    f"{call} waits for process {index}, which {other.end}",
                    "make every process call it; look for an earlier error in that process",
                )
            is_inside = other.begun == self._begun and other.completed < other.begun
            if is_inside and other.call is not None and not call.fits(other.call) and self._is_stuck(index, other):
                return different_calls({self._process_index: call, index: other.call})
            is_ahead = other.completed == mine.completed and other.exchanges > mine.exchanges
            if other.begun < self._begun and is_ahead and self._is_stuck(index, other):
                here = sorted([self._process_index, *(i for i, o in reports.items() if o and o.begun >= self._begun)])
                return (
                    f"{call} was called by process {', '.join(map(str, here))} only: process {index} has gone on to {other.at}, and waits"
                    " there",
                    "call it on every process, outside of `if accelerator.is_main_process`; where loaders differ in length, train inside"
                    " `accelerator.join_uneven_inputs`",
                )
        return None

    def _too_late(self, reports: dict[int, _Report | None]) -> tuple[str, str]:
        """In words and with a hint: who has not come."""
        late = {index: one for index, one in reports.items() if one is None or one.begun < self._begun} or reports
        said = "; ".join(
            f"process {index} {'does not answer' if one is None else f'is at {one.at}'}" for index, one in late.items()
        )
        whom = f"process {', '.join(map(str, late))}: {said}" if late else "the others"
        return (
            f"{self.call} has waited {self.timeout_s:g} s (timeout_s) for {whom}",
            "make every process call it; where they are only slow, raise timeout_s",
        )

    def _is_stuck(self, index: int, other: _Report) -> bool:
        # Not at once: an operation that begins with an exchange of what was called is about to say so, and the job can go on after it.
        now = time.monotonic()
        seen, since = self._elsewhere.get(index, (None, now))
        if seen != other:
            self._elsewhere[index] = (other, now)
            return False
        return now - since >= _STUCK_S

    # -- between processes -------------------------------------------------------------------------------------------------

    def _reports(self) -> dict[int, _Report | None]:
        """What the others say; None of a process that has said nothing (or where the store has gone). Asks them to say it anew."""
        others = [index for index in range(self._num_processes) if index != self._process_index]
        reports: dict[int, _Report | None] = dict.fromkeys(others)
        if self._open_store is None:
            return reports
        try:
            self._store = self._store or self._open_store()
            self._num_looks += 1
            self._store.set(self._key(self._process_index), self._report().text())
            self._store.set(f"{self._prefix}/asked", f"{self._process_index} {self._num_looks}")
            for index in others:
                text = self._store.get(self._key(index))
                reports[index] = None if text is None else _Report.of(text)
        except (RuntimeError, NotImplementedError) as error:
            log.info("the other processes cannot be asked where they are: %s", error)
        return reports

    def _report(self, end: str = "") -> _Report:
        name, place = call_site(sys._current_frames().get(self._user_thread))
        is_inside = self._completed < self._begun
        at = f"{name} at {place}" if name else place
        exchanges = self._num_exchanges() - self._exchanges_before
        return _Report(self._begun, self._completed, exchanges, self._call if is_inside else None, at, end)

    def _key(self, index: int) -> str:
        return f"{self._prefix}/{index}"

    def _start(self, open_store: Callable[[], Store]) -> None:
        try:
            store = open_store()
        except (RuntimeError, NotImplementedError) as error:  # a script's own group, on a store that cannot be shared
            log.info("no store for what the processes say of themselves: %s", error)
            self._open_store = None
            return
        self._thread = threading.Thread(target=self._answer, args=(store,), name="collective-calls", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _answer(self, store: Store) -> None:
        pause_s = max(_ANSWER_S, self._num_processes / _PROCESSES_PER_S)
        answered: str | None = None
        try:
            while not self._is_closed.wait(pause_s):
                asked = store.get(f"{self._prefix}/asked")
                if asked is not None and asked != answered:
                    answered = asked
                    store.set(self._key(self._process_index), self._report().text())
        except RuntimeError as error:
            log.info("the other processes can no longer ask where this one is: %s", error)

    def _end(self) -> None:
        error = getattr(sys, "last_value", None)
        self.close("has ended" if error is None else f"has ended with {type(error).__name__}")

    def close(self, end: str = "has left the job") -> None:
        """Say how this process's part of the job has ended: the others must not wait for it. Idempotent."""
        if self._is_closed.is_set() or os.getpid() != self._pid or self._thread is None:
            return
        self._is_closed.set()
        atexit.unregister(self._end)
        self._thread.join(2 * _ANSWER_S)
        assert self._open_store is not None
        try:
            (self._store or self._open_store()).set(self._key(self._process_index), self._report(end).text())
        except RuntimeError as error:
            log.info("nobody is left to be told that this process %s: %s", end, error)


def different_calls(calls: dict[int, Call]) -> tuple[str, str]:
    """The words of the error where processes, by index, have called operations that do not fit."""
    rows = {index: f"{call}" for index, call in sorted(calls.items())}
    if len({call.name for call in calls.values()}) == 1:  # the difference is in what they were called with
        rows = {index: f"{call} ({call.operation} {call.detail})" for index, call in sorted(calls.items())}
    seen = "; ".join(f"process {index}: {row}" for index, row in rows.items())
    return (
        f"the processes called different collectives ({seen})",
        "make every process take the same path through the script",
    )


def call_site(frame: FrameType | None, engine: str = "") -> tuple[str, str]:
    """What a script called, of polyaccel, and where: (function, "file:line"); of a thread that is in no call, ("", where it is).

    `engine` is the package of an engine, which stands for polyaccel.
    """
    name = ""
    while frame is not None:
        root = _package(frame)
        if root.startswith("polyaccel") or root == engine:
            code = frame.f_code
            if not code.co_name.startswith("<"):
                name = code.co_qualname if code.co_name.startswith("__") else code.co_name
        elif root not in _PASSED:
            return name, f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return name, "an unknown place"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@functools.lru_cache(1024)
def _short(path: str) -> str:
    folder = os.getcwd() + os.sep
    return path.removeprefix(folder)
