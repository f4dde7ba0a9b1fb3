"""Every program that the engine compiled: what it is, what made it necessary, how long it took. One log line for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from polyaccel.protocols import CompileEvent
from polyaccel_jax.flops import FlopMeter

if TYPE_CHECKING:
    from polyaccel_jax.planning.planner import Planner

_log = logging.getLogger("polyaccel.jax")
_MANY = 8  # programs of one kind from which on each is a warning: buckets of a batch are fewer

Facts = Mapping[str, str]  # everything that a program was specialised on, in readable words


@final
class CompileLog:
    """The compiled programs of one engine, in order.

    A traced function says `tracing(...)`; `run` around the jitted function notices that it did, and knows how long it all took.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.planner = planner
        self.events: list[CompileEvent] = []
        self.count = 0  # programs traced, one that failed to compile included
        self.num_updates = 0  # optimizer updates that were taken
        self.meter: FlopMeter | None = None  # counts operations, once somebody asks for them
        self._pending: tuple[str, Facts] | None = None
        self._capture_s = 0.0
        self._seen: dict[str, list[Facts]] = {}

    @property
    def pending(self) -> str | None:
        """The program that was traced and is not noted yet."""
        return None if self._pending is None else self._pending[0]

    def build(self, function: Callable[[], Any]) -> Any:
        """Call what makes a program; its time is the capture of the next program that is traced."""
        start = time.perf_counter()
        program = function()
        self._capture_s += time.perf_counter() - start
        return program

    def tracing(self, program: str, facts: Facts) -> None:
        """Traced: `program` is being compiled for these facts."""
        self.count += 1
        self._pending = (program, facts)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`. If that traced a program, the event is noted and logged."""
        if self._pending is not None:  # an earlier program failed while it was traced or compiled
            self._pending = None
        if self.planner is not None:
            function = self.planner.planned(function)  # compiled, and not run
        # The one clock reading of a step that compiles nothing: 40 ns.
        start = time.perf_counter()
        result = function(*args)
        if self._pending is not None:
            self._note(*self._pending, time.perf_counter() - start)
        if self.meter is not None and self.planner is None:
            self.meter.ran(function, args)
        return result

    def _note(self, program: str, facts: Facts, compile_s: float) -> None:
        capture_s, self._capture_s, self._pending = self._capture_s, 0.0, None
        seen = self._seen.setdefault(program, [])
        cause = _cause(seen, facts)
        seen.append(facts)
        self.events.append(CompileEvent(program, cause, capture_s, compile_s, self.num_updates))
        times = f"{capture_s + compile_s:.2f} s ({capture_s:.2f} s of them capture)"
        if len(seen) == 1:
            _log.info("compiled %s in %s", program, times)
            return
        is_many = len(seen) >= _MANY
        _log.log(
            logging.WARNING if is_many else logging.INFO,
            "compiled %s again in %s, program %d: %s%s",
            program,
            times,
            len(seen),
            cause,
            ". hint: pad batches to few sizes with polyaccel.data.Bucketing, pass numbers that change as tensors"
            if is_many
            else "",
        )


def _cause(seen: list[Facts], facts: Facts) -> str:
    """What differs from the most similar earlier program (the latest of equally similar ones)."""
    if not seen:
        return "first call"
    nearest = min(reversed(seen), key=lambda earlier: len(_differences(earlier, facts)))
    differences = _differences(nearest, facts)
    return "; ".join(differences) or "another object, or another structure of the arguments or of the state"


def _differences(before: Facts, now: Facts) -> list[str]:
    names = dict.fromkeys((*now, *before))
    return [
        f"{name} changed from {before.get(name, 'absent')} to {now.get(name, 'absent')}"
        for name in names
        if before.get(name) != now.get(name)
    ]
