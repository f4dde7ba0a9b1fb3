"""What torch tells of a running training: traces by torch.profiler, and the memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError, nearest
from polyaccel_torch import tpu


class TorchTracer:
    """See `polyaccel.protocols.Tracer`. Traces are `<name>.pt.trace.json`, which torch's TensorBoard plugin finds."""

    native: Any = None  # the torch.profiler.profile of the last trace

    def __init__(self, settings: ProfileKwargs) -> None:
        self._settings = settings
        self._activities = None if settings.activities is None else [_activity(name) for name in settings.activities]
        self._file = Path()

    def warm_up(self) -> None:
        """Start torch.profiler's collectors."""
        settings = self._settings
        # A new one for each trace: an old one would warn that it forgets its first trace.
        self.native = profile(
            activities=self._activities,
            record_shapes=settings.record_shapes,
            profile_memory=settings.profile_memory,
            with_stack=settings.with_stack,
            with_flops=settings.with_flops,
            with_modules=settings.with_modules,
        )
        self.native.prepare_trace()

    def start(self, folder: Path, name: str) -> None:
        """Record from now on."""
        self._file = folder / f"{name}.pt.trace.json"
        self.native.start_trace()

    def stop(self) -> list[Path]:
        """Write the trace."""
        self.native.stop_trace()
        self.native.export_chrome_trace(str(self._file))
        return [self._file]

    def discard(self) -> None:
        """Close the collectors."""
        self.native.start_trace()
        self.native.stop_trace()

    def span(self, name: str, step: int | None) -> AbstractContextManager[Any]:
        """A torch.profiler.record_function."""
        return record_function(name if step is None else f"{name}#{step}")


def _activity(name: str) -> ProfilerActivity:
    here = {activity.name.lower(): activity for activity in supported_activities()}
    if name not in here:
        raise UnsupportedError(
            f"activities has {name!r}, which torch.profiler does not record here", nearest(name, here)
        )
    return here[name]


def device_name(device: torch.device) -> str:
    """What the driver calls the device."""
    if device.type == "tpu":
        return tpu.device_name(device)
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def device_memory(device: torch.device) -> tuple[int, int | None] | None:
    """The most bytes that tensors had in use so far, and those of the device; None on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
    return None


def fence(device: torch.device) -> Callable[[], object] | None:
    """A function that waits for the work of the current stream; None where it is done, on the CPU always."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return None if event.query() else event.synchronize
