"""A loop that shows how far it is and how fast: steps and samples per second, waiting for data, memory, MFU, the latest metrics.

Nothing here waits for a device. Between two looks (five in a second on a terminal) a step costs two readings of the clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from polyaccel.data import PreparedLoader
from polyaccel.errors import PrepareError
from polyaccel.looking import bars
from polyaccel.looking.bars import Display, Field, View
from polyaccel.looking.meter import Fence, Meter, Rates

NOTE_S = 10.0  # between two notes in the run folder
MAX_METRICS = 4
_END = object()


@dataclass(frozen=True, slots=True)
class Instruments:
    """Where a bar reads what a loop cannot tell.

    Args:
        is_shown: False: the loop runs as if there were no bar.
        memory: (bytes in use, limit or None) of this process's device, or None.
        count_flops: starts counting; gives a function that returns the floating point operations since then, or None.
        peak_flops: what all devices of the job can do in a second; None: unknown.
        metrics: by name (number of the log call, latest number) of what was logged.
        fetch: of values by name their numbers, or where some are on a device still, a function that waits for them.
        note: keeps facts in the run folder; may be called on another thread.
        fence: see `Meter`.
    """

    is_shown: bool = True
    memory: Callable[[], tuple[int, int | None] | None] = lambda: None
    count_flops: Callable[[], Callable[[], float | None]] | None = None
    peak_flops: float | None = None
    metrics: Callable[[], Mapping[str, tuple[int, Any]]] = dict
    fetch: Callable[[Mapping[str, Any]], Any] = dict
    note: Callable[[Mapping[str, Any]], None] = lambda facts: None
    fence: Fence | None = None


class Progress:
    """Iterate over it, or use it as a context and call `update`; `show` adds metrics to the ones that are logged.

    `description` may be changed at any time.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        instruments: Instruments,
        *,
        description: str = "",
        total: int | None = None,
        batch_size: int | None = None,
        flops_per_step: float | None = None,
    ) -> None:
        if iterable is not None and total is None:
            total = _length(iterable)
        self.description = description
        self.total = total
        self._iterable = iterable
        self._instruments = instruments
        self._flops_per_step = flops_per_step
        self._batch_size = batch_size
        self._loader: Any = iterable if isinstance(iterable, PreparedLoader) and batch_size is None else None
        self._meter: Meter | None = None
        self._display: Display | None = None
        self._readout = _Readout(instruments.fetch)
        self._given: Mapping[str, Any] | None = None
        self._skipped = 0  # steps that were done before: of an epoch that is continued
        self._due = self._draw_due = self._note_due = math.inf
        self._logged_before: dict[str, int] = {}

    # -- what user code calls --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("this loop has no length: pass total=")
        return self.total

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise PrepareError(
                "this progress bar has nothing to iterate over",
                "pass an iterable, or call its update() after every step",
            )
        if not self._instruments.is_shown:
            yield from self._iterable
            return
        is_data = not isinstance(self._iterable, (range, list, tuple))  # a loop over epochs waits for nothing
        meter = self._open(counts_waiting=is_data)
        clock, loader, size = time.perf_counter, self._loader, self._batch_size
        source = iter(self._iterable)
        try:
            before = clock()
            while True:
                item = next(source, _END)
                if item is _END:
                    break
                meter.wait_s += clock() - before
                if size is None:  # a loader may learn it from its first batch
                    size = None if loader is None else loader.total_batch_size
                    meter.counts_samples = size is not None
                    size = size or 0
                real = -1 if loader is None else loader.remainder
                try:
                    yield item
                finally:  # a batch whose body breaks was handed out, and counts: as in the loader's own state
                    item = None  # the body owns it: its memory is not kept while the next one is made
                    meter.num_steps += 1
                    meter.num_samples += size if real < 0 else real
                before = clock()
                if before >= self._due:
                    self._look(before)
        finally:  # also where the body breaks or raises
            self.close()

    def __enter__(self) -> Progress:
        if self._instruments.is_shown and self._iterable is None:
            self._open(counts_waiting=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, num_steps: int = 1, num_samples: int | None = None) -> None:
        """Count steps of a loop that the bar does not iterate over, and the samples in them (default: `batch_size` each)."""
        if not self._instruments.is_shown:
            return
        meter = self._meter if self._meter is not None else self._open(counts_waiting=False)
        meter.num_steps += num_steps
        meter.num_samples += num_steps * (self._batch_size or 0) if num_samples is None else num_samples
        now = time.perf_counter()
        if now >= self._due:
            self._look(now)

    def show(self, **values: Any) -> None:
        """Show these metrics, instead of those that are logged. Values may be on a device: they appear when they are there."""
        self._given = values

    def close(self) -> None:
        """Draw the last state and note the whole loop in the run folder. Idempotent."""
        meter, display = self._meter, self._display
        self._meter = self._display = None
        self._due = math.inf
        if meter is None or display is None:
            return
        description, seconds = self.description, time.perf_counter() - meter.started

        def when_done() -> None:
            rates = meter.overall()
            if display.may_close_late:
                display.close(self._view(meter, rates, description, seconds, is_over=True))
            if meter.num_steps:
                self._note(meter, rates, description, seconds, is_over=True)

        meter.mark(when_done)
        if not display.may_close_late:
            display.close(self._view(meter, meter.overall(), description, seconds, is_over=True))

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _open(self, *, counts_waiting: bool) -> Meter:
        if self._meter is not None:
            return self._meter
        instruments, per_step = self._instruments, self._flops_per_step
        meter = Meter(counts_waiting=counts_waiting, fence=instruments.fence)
        meter.counts_samples = self._batch_size is not None
        flops: Callable[[], float | None] | None = None
        if per_step is not None:
            flops = lambda: meter.num_steps * per_step  # noqa: E731
        elif instruments.count_flops is not None:
            flops = instruments.count_flops()
        meter.flops = flops
        self._logged_before = {name: count for name, (count, _) in instruments.metrics().items()}
        self._meter = meter
        self._display = bars.display_for(View(self.description, 0, self.total, ()))
        self._skipped = 0
        self._due = 0.0  # after the first step, which is where rates begin
        self._draw_due = meter.started + (self._display.every_s if self._display.every_s > 1 else 0)
        self._note_due = meter.started + NOTE_S
        return meter

    def _look(self, now: float) -> None:
        meter, display = self._meter, self._display
        if meter is None or display is None:
            return
        if not meter.is_marked and self._loader is not None:
            # Of an epoch that is continued, the batches before its start are done; those that `skipping` left out are not in its length.
            self._skipped = self._loader.state.batch - meter.num_steps - self._loader._skip
        meter.mark()
        if now >= self._note_due:
            self._note_due = now + NOTE_S
            rates = meter.since_noted()
            if rates.num_steps:
                self._note(meter, rates, self.description, rates.seconds, is_over=False)
        if now >= self._draw_due:
            self._draw_due = now + display.every_s
            elapsed = now - meter.started
            display.draw(self._view(meter, meter.recent(), self.description, elapsed, is_over=False))
        self._due = min(self._draw_due, self._note_due)

    def _view(self, meter: Meter, rates: Rates, description: str, seconds: float, *, is_over: bool) -> View:
        done = self._skipped + meter.num_steps
        return View(description, done, self.total, self._fields(rates, bars.clock(seconds), done, is_over=is_over))

    def _fields(self, rates: Rates, elapsed: str, done: int, *, is_over: bool) -> list[Field]:
        fields = []
        if rates.steps_per_s and self.total is not None and not is_over:
            fields.append(Field(f"{elapsed}<{bars.clock(max(self.total - done, 0) / rates.steps_per_s)}", 9))
        else:
            fields.append(Field(elapsed, 9))
        if rates.steps_per_s:
            fields.append(Field(f"{bars.short(rates.steps_per_s)} steps/s", 8))
        if rates.samples_per_s:
            fields.append(Field(f"{bars.short(rates.samples_per_s)} samples/s", 5))
        if rates.data_share is not None:
            fields.append(Field(f"data {rates.data_share:.0%}", 3))
        memory = self._instruments.memory()
        if memory is not None:
            fields.append(Field(bars.memory(*memory), 2))
        if rates.flops_per_s:
            mfu = self._mfu(rates)
            text = f"{bars.short(rates.flops_per_s)}FLOP/s" if mfu is None else f"MFU {mfu:.1%}"
            fields.append(Field(text, 4))
        fields += [Field(f"{name} {bars.metric(value)}", 6) for name, value in self._metrics().items()]
        return fields

    def _mfu(self, rates: Rates) -> float | None:
        peak = self._instruments.peak_flops
        return None if rates.flops_per_s is None or peak is None else rates.flops_per_s / peak

    def _metrics(self) -> dict[str, Any]:
        if self._given is not None:
            found = self._readout.latest(self._given)
        else:
            before = self._logged_before
            logged = self._instruments.metrics().items()
            found = {name: value for name, (count, value) in logged if count > before.get(name, -1)}
        numbers = {name: value for name, value in found.items() if type(value) in (int, float)}
        leading = sorted(numbers, key=lambda name: "loss" not in name.lower())  # stable: else in their own order
        return {name: numbers[name] for name in leading[:MAX_METRICS]}

    def _note(self, meter: Meter, rates: Rates, description: str, seconds: float, *, is_over: bool) -> None:
        memory = self._instruments.memory()
        self._instruments.note(
            {
                "description": description,
                "num_steps": meter.num_steps,
                "seconds": seconds,
                "measured_s": rates.seconds,  # of the rates, which begin after the first step and end when the device is done
                "steps_per_s": rates.steps_per_s,
                "samples_per_s": rates.samples_per_s,
                "data_share": rates.data_share,
                "memory_bytes": None if memory is None else memory[0],
                "flops_per_s": rates.flops_per_s,
                "mfu": self._mfu(rates),
                "is_over": is_over,
            }
        )


class _Readout:
    """Numbers of values that may be on a device: a thread waits for them, and shows the last ones until they are there."""

    def __init__(self, fetch: Callable[[Mapping[str, Any]], Any]) -> None:
        self._fetch = fetch
        self._numbers: dict[str, Any] = {}
        self._seen: Any = None
        self._is_waiting = False

    def latest(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The newest numbers that are there; asks for those of `values`."""
        if values is not self._seen and not self._is_waiting:
            self._seen = values
            fetched = self._fetch(values)
            if callable(fetched):
                self._is_waiting = True
                threading.Thread(target=self._wait, args=(fetched,), name="polyaccel-progress", daemon=True).start()
            else:
                self._numbers = fetched
        return self._numbers

    def _wait(self, finish: Callable[[], dict[str, Any]]) -> None:
        try:
            self._numbers = finish()
        finally:
            self._is_waiting = False


def _length(iterable: Iterable[Any]) -> int | None:
    try:
        return len(iterable)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None  # a stream: a torch loader of one has a __len__ that raises
