"""Traces of torch_xla: what the host, the graphs and the devices do, as XLA's profiler writes it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch_xla
from torch_xla.debug import profiler

from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError

_UNKNOWN = ("activities", "profile_memory", "with_stack")


class XlaTracer:
    """See `polyaccel.protocols.Tracer`. Traces are folders `<name>/plugins/profile/...`, which TensorBoard's profile plugin finds.

    Shapes, operations and modules stand in every trace. Raises UnsupportedError for what torch_xla's recorder cannot be told.
    """

    native: Any = None

    def __init__(self, settings: ProfileKwargs) -> None:
        for name in _UNKNOWN:
            if getattr(settings, name):
                raise UnsupportedError(
                    f"ProfileKwargs({name}={getattr(settings, name)!r}): torch_xla's recorder has no such choice",
                    f"leave {name} out, or profile on backend 'torch' or 'jax'",
                )
        self._folder = Path()

    def warm_up(self) -> None:
        """Nothing: the recorder starts with the trace."""

    def start(self, folder: Path, name: str) -> None:
        """Record from now on."""
        self._folder = folder / name
        profiler.start_trace(self._folder)

    def stop(self) -> list[Path]:
        """Write the trace."""
        profiler.stop_trace()
        found = [file for file in self._folder.rglob("*") if file.is_file()]
        return sorted(found, key=lambda file: (".json" not in file.name, file.name))

    def discard(self) -> None:
        """Nothing was started."""

    def span(self, name: str, step: int | None) -> AbstractContextManager[Any]:
        """A span of the host. torch_xla's own `Trace` would also name every operation inside, and compile each step anew."""
        plain = name.replace("#", " ")  # which begins the arguments of a span
        if step is None:
            return torch_xla._XLAC.profiler.TraceMe(plain)
        return torch_xla._XLAC.profiler.TraceMe(f"{plain} {step}", step_num=step, _r=1)
