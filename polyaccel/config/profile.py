"""What a profile records, and when: Accelerate's ProfileKwargs, with its meaning on every engine that records traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from polyaccel.config.handler import KwargsHandler
from polyaccel.errors import ConfigError, nearest

Phase = Literal["idle", "warm up", "record", "record and save"]
_COUNTS = ("wait", "warmup", "active", "repeat", "skip_first", "skip_first_wait")


@dataclass(frozen=True, slots=True)
class ProfileKwargs(KwargsHandler):
    """Settings of `accelerator.profile`.

    Args:
        activities: "cpu" for the host, and the device's own name ("cuda", "tpu", ...); None: everything that is here.
        schedule_option: numbers of steps by name: `skip_first` once, then in a circle `wait`, `warmup` (recorded and thrown away),
            `active` (recorded, and saved at its end); `repeat` circles, 0 for as many as there are. With `skip_first_wait` above 0
            the first circle has no `wait`. None: everything inside the block is one trace.
        on_trace_ready: called with the profile each time a trace has been saved.
        record_shapes: note the shapes of what operations take.
        profile_memory: note what is allocated on devices.
        with_stack: note the Python functions that the host was in.
        with_flops: note the floating point operations of operations.
        with_modules: note which module an operation belongs to.
        output_trace_dir: folder of the traces; None: `profile` in the run's folder, and without a run in that of the project.

    Raises ConfigError for a schedule that is none.
    """

    activities: Iterable[str] | None = None
    schedule_option: Mapping[str, int] | None = None
    on_trace_ready: Callable[[Any], Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = self.schedule_option
        if given is None:
            return
        for name, count in given.items():
            if name not in _COUNTS:
                raise ConfigError(f"schedule_option has no {name!r}", nearest(name, _COUNTS))
            if not isinstance(count, int) or count < (1 if name == "active" else 0):
                raise ConfigError(
                    f"schedule_option: {name}={count!r} is no number of steps",
                    "give a whole number, 0 or more; active at least 1",
                )
        if "active" not in given:
            raise ConfigError("schedule_option names no active steps, so nothing would be recorded", "add active=3")

    def settings(self) -> dict[str, Any]:
        """None: a profile is no setting of the training."""
        return {}

    def phase(self, step: int) -> Phase:
        """What is done with step number `step`, from 0 (torch.profiler.schedule)."""
        if self.schedule_option is None:
            return "record"
        wait, warmup, active, repeat, skip_first, skip_first_wait = (self.schedule_option.get(n, 0) for n in _COUNTS)
        if step < skip_first:
            return "idle"
        step += (wait if skip_first_wait else 0) - skip_first
        circle, at = divmod(step, wait + warmup + active)
        if (repeat and circle >= repeat) or at < wait:
            return "idle"
        if at < wait + warmup:
            return "warm up"
        return "record" if at < wait + warmup + active - 1 else "record and save"
