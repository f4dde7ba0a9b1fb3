"""Counts what a loop does, and makes rates of it. A step costs its caller two readings of the clock and a few additions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 8.0  # rates that are shown are those of about this time; a compilation stays in them no longer


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


class _Moment(NamedTuple):
    at: float
    num_steps: int
    num_samples: int
    wait_s: float
    flops: float | None


class Meter:
    """The counters of one loop.

    `num_steps`, `num_samples` and `wait_s` are written by the loop itself. Rates begin after the first step: what it compiles, and the
    start of a loader's workers, is no rate. Steps that an asynchronous device has not done yet count when they are handed to it; its
    queue is short, so that the rates of seconds are the device's.

    Args:
        counts_samples, counts_waiting: whether the loop tells samples, and when it waits.

    `flops`, where it is set, gives the floating point operations since then, None where they are not known.
    """

    def __init__(
        self,
        *,
        counts_samples: bool,
        counts_waiting: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_steps = 0
        self.num_samples = 0
        self.wait_s = 0.0
        self._counts_samples = counts_samples
        self._counts_waiting = counts_waiting
        self.flops: Callable[[], float | None] | None = None
        self._clock = clock
        self.started = clock()
        self._first: _Moment | None = None
        self._noted: _Moment | None = None
        self._window: deque[_Moment] = deque()

    @property
    def is_fresh(self) -> bool:
        """True until the first look, which is where rates begin."""
        return self._first is None

    def recent(self) -> Rates:
        """Rates of the last WINDOW_S seconds. Called at every look, which is when the window moves."""
        now = self._moment()
        if self._first is None:
            self._first = self._noted = now
        window = self._window
        window.append(now)
        while len(window) > 2 and now.at - window[1].at >= WINDOW_S:
            window.popleft()
        return self._between(window[0], now)

    def since_noted(self) -> Rates:
        """Rates since this was last asked; of the time after the first step."""
        now = self._moment()
        rates = self._between(self._noted or now, now)
        self._noted = now
        return rates

    def overall(self) -> Rates:
        """Rates of everything after the first step."""
        now = self._moment()
        return self._between(self._first or now, now)

    def _moment(self) -> _Moment:
        flops = None if self.flops is None else self.flops()
        return _Moment(self._clock(), self.num_steps, self.num_samples, self.wait_s, flops)

    def _between(self, before: _Moment, now: _Moment) -> Rates:
        seconds, steps = now.at - before.at, now.num_steps - before.num_steps
        if seconds <= 0 or steps <= 0:
            return Rates(max(seconds, 0.0), steps, None, None, None, None)
        flops = None if now.flops is None or before.flops is None else (now.flops - before.flops) / seconds
        return Rates(
            seconds,
            steps,
            steps / seconds,
            (now.num_samples - before.num_samples) / seconds if self._counts_samples else None,
            (now.wait_s - before.wait_s) / seconds if self._counts_waiting else None,
            flops or None,  # no operation at all: nothing was run that counts them
        )
