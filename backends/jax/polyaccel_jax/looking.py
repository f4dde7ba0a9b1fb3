"""What jax tells of a running training: traces by jax.profiler, and the memory of the devices."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileOptions, StepTraceAnnotation, TraceAnnotation

from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError, nearest


class JaxTracer:
    """See `polyaccel.protocols.Tracer`. Traces are folders `<name>/plugins/profile/...`, which TensorBoard's profile plugin finds.

    Shapes, operations and modules stand in every trace of XLA, so `record_shapes`, `with_flops` and `with_modules` ask for nothing
    more. `profile_memory` adds what is held on the devices at the end of the trace, for pprof.
    """

    native: Any = None

    def __init__(self, settings: ProfileKwargs, devices: Iterable[jax.Device]) -> None:
        self._settings = settings
        names = {device.platform for device in devices} | {"cpu"}
        # jax calls it "gpu" where scripts of torch say "cuda".
        names |= {"cuda"} if "gpu" in names else set()
        activities = names if settings.activities is None else set(settings.activities)
        for name in activities - names:
            raise UnsupportedError(
                f"activities has {name!r}, which jax.profiler does not record here", nearest(name, names)
            )
        self._records_devices = bool(activities - {"cpu"}) or names == {"cpu"}
        self._records_host = "cpu" in activities
        self._folder = Path()

    def warm_up(self) -> None:
        """Nothing: the recorder starts with the trace."""

    def start(self, folder: Path, name: str) -> None:
        """Record from now on."""
        self._folder = folder / name  # of its own: jax names what is below it by the second
        options = ProfileOptions()
        options.python_tracer_level = int(self._settings.with_stack)
        options.device_tracer_level = int(self._records_devices)
        options.host_tracer_level = (
            2 if self._records_host else 1
        )  # 1: the names of the steps, which are nothing without
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)

    def stop(self) -> list[Path]:
        """Write the trace: for Perfetto, for TensorBoard, and with `profile_memory` for pprof."""
        jax.profiler.stop_trace()
        files = sorted(self._folder.rglob("perfetto_trace.json.gz")) + sorted(self._folder.rglob("*.xplane.pb"))
        if self._settings.profile_memory:
            held = self._folder / "memory.prof"
            jax.profiler.save_device_memory_profile(str(held))
            files.append(held)
        return files

    def discard(self) -> None:
        """Nothing was started."""

    def span(self, name: str, step: int | None) -> AbstractContextManager[Any]:
        """An annotation of jax.profiler, which takes what follows # for arguments."""
        plain = name.replace("#", " ")
        return TraceAnnotation(plain) if step is None else StepTraceAnnotation(f"{plain} {step}", step_num=step)


def device_memory(devices: Iterable[jax.Device]) -> tuple[int, int | None] | None:
    """The most bytes that were in use on one of the devices, and its limit; None where they are the host's."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    if not found:
        return None
    # Not every platform keeps the peak.
    used = [stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)) for stats in found]
    fullest = used.index(max(used))
    return used[fullest], found[fullest].get("bytes_limit")
