"""Where a progress bar reads what a loop cannot tell: the engine's devices and operations, and what the script has logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyaccel.looking.devices import peak_of, process_memory
from polyaccel.looking.progress import Instruments


def instruments(
    engine: Any,
    features: frozenset[str],
    *,
    is_shown: bool,
    metrics: Callable[[], Mapping[str, tuple[int, Any]]],
    fetch: Callable[[Mapping[str, Any]], Any],
    note: Callable[[Mapping[str, Any]], None],
) -> Instruments:
    """What this engine declares to know; the rest is not shown."""
    topology = engine.topology
    tells_devices = "device_stats" in features
    is_on_host = "cpu" in topology.device_kind.lower()
    peak = peak_of(engine.device_name) if tells_devices else None

    def memory() -> tuple[int, int | None] | None:
        used: tuple[int, int | None] | None = engine.device_memory() if tells_devices else None
        resident = process_memory() if used is None and is_on_host else None
        return (resident, None) if resident is not None else used

    return Instruments(
        is_shown=is_shown,
        memory=memory,
        count_flops=engine.count_flops if "flops" in features else None,
        peak_flops=None if peak is None else peak.flops * topology.num_devices,
        metrics=metrics,
        fetch=fetch,
        note=note,
        fence=engine.fence if "fence" in features else None,
    )
