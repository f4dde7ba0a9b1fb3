"""`accelerate.state`: PartialState, AcceleratorState and GradientState, as views of the newest Accelerator of this process.

They hold nothing of the job: two instances always say the same, and one that was made before the Accelerator sees it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyaccel import accumulation, jobs
from polyaccel.accelerator import Accelerator
from polyaccel.config.exchange import InitProcessGroupKwargs
from polyaccel.distribution import DistributedType
from polyaccel.errors import UnsupportedError
from polyaccel.facade.state import AcceleratorState, JobView

__all__ = ["AcceleratorState", "DistributedType", "GradientState", "PartialState", "is_initialized"]

_gradients: accumulation.GradientState | None = None  # of a script without an Accelerator


def is_initialized() -> bool:
    """Whether the script has made an Accelerator."""
    return jobs.of_script() is not None


class PartialState(JobView):
    """The job as this process sees it, also for scripts that make no Accelerator.

    Args:
        cpu: use the CPU even where an accelerator is present; only where this opens the job.
        kwargs: `backend` and `timeout`, as of InitProcessGroupKwargs; only where this opens the job. Others are refused.

    Without an Accelerator it opens the job that `Accelerator()` would, so every process must then make it. Reading a property after
    `_reset_state` raises AttributeError until there is an Accelerator or PartialState again.
    """

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        others = kwargs.keys() - {"backend", "init_method", "timeout"}
        if others:
            raise UnsupportedError(
                f"PartialState cannot pass on {', '.join(sorted(others))}: the engine connects the processes",
                'choose the engine and its settings by configuration, such as POLYACCEL_BACKEND="torch"',
            )
        if jobs.accelerator() is None:
            handlers = [InitProcessGroupKwargs(**kwargs)] if kwargs else None
            jobs.keep(lambda: Accelerator(cpu=cpu or None, kwargs_handlers=handlers))
            jobs.accelerator()

    @staticmethod
    def _reset_state() -> None:
        """Start over, as if there were no job; what the Accelerators hold stays as it is."""
        jobs.forget()

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on process 0 only; None elsewhere."""
        return self._job.on_main_process(function)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on the first process of every host only."""
        return self._job.on_local_main_process(function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on the last process only."""
        return self._job.on_last_process(function)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on process `process_index` only."""
        return self._job.on_process(function, process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: runs on process `local_process_index` of every host only."""
        return self._job.on_local_process(function, local_process_index)


class _GradientSnapshot:
    """`GradientState._shared_state`: what it says now, by name; empty where nothing counts yet."""

    def __get__(self, instance: object, owner: type[GradientState]) -> dict[str, Any]:
        if jobs.accelerator() is None and _gradients is None:
            return {}
        view = object.__new__(owner)
        return {name: getattr(view, name) for name in ("num_steps", "sync_gradients", "end_of_dataloader", "remainder")}


class GradientState:
    """When gradients are exchanged, as the newest Accelerator counts; in a script without one, every batch is a real one."""

    _shared_state = _GradientSnapshot()

    def __init__(self, gradient_accumulation_plugin: Any = None) -> None:
        if gradient_accumulation_plugin is not None:
            raise UnsupportedError(
                "GradientState takes no plugin: each Accelerator counts for itself",
                "write Accelerator(gradient_accumulation_steps=...)",
            )

    @property
    def _state(self) -> accumulation.GradientState:
        global _gradients
        accelerator = jobs.accelerator()
        if accelerator is not None:
            state: accumulation.GradientState = accelerator.gradient_state
            return state
        if _gradients is None:
            _gradients = accumulation.GradientState(1)
        return _gradients

    @staticmethod
    def _reset_state() -> None:
        """Forget what was set without an Accelerator; an Accelerator's own count stays."""
        global _gradients
        _gradients = None

    @property
    def initialized(self) -> bool:
        """Always: an instance can be asked at any time."""
        return True

    @property
    def num_steps(self) -> int:
        """Batches per optimizer update."""
        return self._state.num_steps

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the last batch of a loader closes the window."""
        return self._state.sync_with_dataloader

    @property
    def sync_gradients(self) -> bool:
        """True on the batch whose step is a real one; may be set."""
        return self._state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._state.sync_gradients = value

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        self._state.sync_gradients = sync_gradients

    @property
    def end_of_dataloader(self) -> bool:
        """True while the active loader's last batch is being used."""
        return self._state.end_of_dataloader

    @property
    def remainder(self) -> int:
        """How many samples of the active loader's last global batch are real; -1 when all are."""
        return self._state.remainder

    @property
    def active_dataloader(self) -> Any:
        """The innermost running loader, or None."""
        return self._state.active_dataloader

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is running."""
        return self._state.active_dataloader is not None

    def _add_dataloader(self, dataloader: Any) -> None:
        self._state.loader_started(dataloader)

    def _remove_dataloader(self, dataloader: Any) -> None:
        self._state.loader_finished(dataloader)

    def __repr__(self) -> str:
        return f"GradientState(num_steps={self.num_steps}, sync_gradients={self.sync_gradients})"
