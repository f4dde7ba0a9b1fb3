"""Counts what a loop does, and makes rates of it. A step costs its caller two readings of the clock and a few additions.

Devices run behind the loop. So a rate is measured between two moments at which the device was done with what had been counted, and a
thread waits for these moments: the loop itself never does.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 8.0  # rates that are shown are those of about this time

Fence = Callable[[], Callable[[], object] | None]


class Rates(NamedTuple):
    """What happened between two moments, per second. None: it is not known.

    `data_share` is the part of the time in which the loop waited for its next batch.
    """

    seconds: float
    num_steps: int
    steps_per_s: float | None
    samples_per_s: float | None
    data_share: float | None
    flops_per_s: float | None


_NOTHING = Rates(0.0, 0, None, None, None, None)


class _Counted(NamedTuple):
    num_steps: int
    num_samples: int
    wait_s: float
    flops: float | None


class _Moment(NamedTuple):
    at: float
    counted: _Counted


class Meter:
    """The counters of one loop.

    `num_steps`, `num_samples` and `wait_s` are written by the loop itself. Rates begin after the first step: what it compiles, and the
    start of a loader's workers, is no rate.

    Args:
        counts_waiting: whether the loop tells when it waits.
        fence: gives a function that returns when the device has done what was given to it so far, None where it has already.

    `counts_samples` says whether the loop tells samples. `flops`, where it is set, gives the floating point operations since then, None
    where they are not known.
    """

    def __init__(
        self,
        *,
        counts_waiting: bool,
        fence: Fence | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_steps = 0
        self.num_samples = 0
        self.wait_s = 0.0
        self.counts_samples = False
        self.flops: Callable[[], float | None] | None = None
        self.is_marked = False
        self._counts_waiting = counts_waiting
        self._fence = fence
        self._clock = clock
        self.started = clock()
        self._first: _Moment | None = None
        self._noted: _Moment | None = None
        self._window: deque[_Moment] = deque()
        self._waiter: _Waiter | None = None

    def mark(self, then: Callable[[], None] | None = None) -> None:
        """Remember what is counted now; the moment is when the device has done it. `then` is called at that moment, and ends the meter."""
        self.is_marked = True
        flops = None if self.flops is None else self.flops()
        counted = _Counted(self.num_steps, self.num_samples, self.wait_s, flops)
        wait = None if self._fence is None else self._fence()
        now = self._clock()
        if wait is None and self._waiter is None:
            self._pass(_Moment(now, counted))
            if then is not None:
                then()
            return
        if self._waiter is None:
            self._waiter = _Waiter(self._pass, self._clock)
            self._waiter.start()
            atexit.unregister(_at_exit)
            atexit.register(_at_exit)
        self._waiter.is_last = then is not None
        self._waiter.marks.put((_Moment(now, counted), wait, then))

    def recent(self) -> Rates:
        """Rates of the last WINDOW_S seconds."""
        window = self._window
        return self._between(window[0], window[-1]) if window else _NOTHING

    def since_noted(self) -> Rates:
        """Rates since this was last asked; of the time after the first step."""
        if self._noted is None:
            return _NOTHING
        before, self._noted = self._noted, self._window[-1]
        return self._between(before, self._noted)

    def overall(self) -> Rates:
        """Rates of everything after the first step."""
        return self._between(self._first, self._window[-1]) if self._first is not None else _NOTHING

    def _pass(self, now: _Moment) -> None:
        window = self._window
        if (
            window
        ):  # a mark that found the device idle can be older than the moment at which the thread saw the one before
            now = now._replace(at=max(now.at, window[-1].at))
        window.append(now)  # before `_first`, by which the other thread sees that there is one
        if self._first is None:
            self._first = self._noted = now
        while len(window) > 2 and now.at - window[1].at >= WINDOW_S:
            window.popleft()

    def _between(self, before: _Moment, now: _Moment) -> Rates:
        seconds, steps = now.at - before.at, now.counted.num_steps - before.counted.num_steps
        if seconds <= 0 or steps <= 0:
            return Rates(max(seconds, 0.0), max(steps, 0), None, None, None, None)
        first, last = before.counted, now.counted
        flops = None if last.flops is None or first.flops is None else (last.flops - first.flops) / seconds
        return Rates(
            seconds,
            steps,
            steps / seconds,
            (last.num_samples - first.num_samples) / seconds if self.counts_samples else None,
            min((last.wait_s - first.wait_s) / seconds, 1.0) if self._counts_waiting else None,
            flops or None,  # no operation at all: nothing was run that counts them
        )


class _Waiter(threading.Thread):
    """Waits for the device, mark by mark, until the last one."""

    def __init__(self, passed: Callable[[_Moment], None], clock: Callable[[], float]) -> None:
        super().__init__(name="polyaccel-progress", daemon=True)
        self.marks: queue.SimpleQueue[tuple[_Moment, Callable[[], object] | None, Callable[[], None] | None]]
        self.marks = queue.SimpleQueue()
        self.is_last = False
        self._passed = passed
        self._clock = clock
        _waiters.add(self)

    def run(self) -> None:
        while True:
            moment, wait, then = self.marks.get()
            if wait is not None:
                try:
                    wait()
                except Exception:  # noqa: BLE001 - the step failed on the device, which the loop is told by its own values
                    return
                moment = moment._replace(at=self._clock())
            self._passed(moment)
            if then is not None:
                then()
                return


_waiters: weakref.WeakSet[_Waiter] = weakref.WeakSet()


def _at_exit() -> None:
    settle(2.0)  # for the last line of a bar


def settle(timeout_s: float) -> None:
    """Return when loops that have ended are noted, or after `timeout_s`: the device may still be busy with their last steps."""
    end = time.monotonic() + timeout_s
    for waiter in list(_waiters):
        if waiter.is_last:
            waiter.join(max(end - time.monotonic(), 0.0))
