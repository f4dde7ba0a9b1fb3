"""`accelerate.state`: PartialState, AcceleratorState and GradientState, as views of the newest Accelerator of this process.

They hold nothing of the job: two instances always say the same, and one that was made before the Accelerator sees it too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from polyaccel import accumulation, jobs
from polyaccel.accelerator import Accelerator
from polyaccel.compat.enums import DistributedType
from polyaccel.errors import ConfigError, NotStartedError, UnsupportedError

_own: Accelerator | None = None  # opened by PartialState, for scripts that make no Accelerator
_hidden: weakref.WeakSet[Accelerator] = weakref.WeakSet()  # from AcceleratorState, since its reset
_gradients: accumulation.GradientState | None = None  # of a script without an Accelerator

_HOSTS = ("cpu", "numpy")
_OTHERS = {"npu": DistributedType.MULTI_NPU, "xpu": DistributedType.MULTI_XPU}


def is_initialized() -> bool:
    """Whether the script has made an Accelerator."""
    return _of_script() is not None


def distributed_type_of(accelerator: Accelerator) -> DistributedType:
    """Accelerate's name for how a job is spread.

    XLA for the engine xla and on TPUs; NO for one process of torch or jax, however many devices it drives; FSDP where several
    processes share the parameters of a model; else by the kind of device.
    """
    topology = accelerator.state
    kind = topology.device_kind.lower()
    if accelerator.backend == "xla" or kind.startswith("tpu"):
        return DistributedType.XLA
    if topology.num_processes == 1:
        return DistributedType.NO
    if accelerator.plan.mesh.fsdp > 1:
        return DistributedType.FSDP
    return DistributedType.MULTI_CPU if kind in _HOSTS else _OTHERS.get(kind, DistributedType.MULTI_GPU)


def _of_script() -> Accelerator | None:
    found = jobs.accelerator()
    return None if found is _own or found in _hidden else found


class _Snapshot:
    """`PartialState._shared_state`: what a state says now, by name; empty before the first and after a reset."""

    def __get__(self, instance: object, owner: type[_View]) -> dict[str, Any]:
        view = object.__new__(owner)
        return {} if view._found() is None else {name: getattr(view, name) for name in owner._known_attrs}


class _View:
    """What PartialState and AcceleratorState have in common."""

    _known_attrs: tuple[str, ...] = (
        "device",
        "distributed_type",
        "local_process_index",
        "num_processes",
        "process_index",
    )
    _shared_state = _Snapshot()

    def _found(self) -> Accelerator | None:
        return jobs.accelerator()

    @property
    def _job(self) -> Accelerator:
        found = self._found()
        if found is None:
            raise NotStartedError(
                f"{type(self).__name__} has no job to speak of",
                "make the Accelerator first: `accelerator = Accelerator()`",
            )
        return found

    def _read(self, name: str) -> Any:
        accelerator = self._found()
        if accelerator is None:
            # An AttributeError, as in Accelerate: hasattr() tells whether there is a job.
            raise AttributeError(
                f"`{type(self).__name__}` object has no attribute `{name}`. This happens if"
                f" `{type(self).__name__}._reset_state()` was called, or the last Accelerator is gone: make a new one."
            )
        return distributed_type_of(accelerator) if name == "distributed_type" else getattr(accelerator, name)

    @property
    def initialized(self) -> bool:
        """Whether there is a job to speak of."""
        return self._found() is not None

    @property
    def device(self) -> Any:
        """Where the script puts its own tensors."""
        return self._read("device")

    @property
    def distributed_type(self) -> DistributedType:
        """How the job is spread; see `distributed_type_of`."""
        kind: DistributedType = self._read("distributed_type")
        return kind

    @property
    def num_processes(self) -> int:
        """Processes of the job."""
        return int(self._read("num_processes"))

    @property
    def process_index(self) -> int:
        """This process, from 0."""
        return int(self._read("process_index"))

    @property
    def local_process_index(self) -> int:
        """This process on its host, from 0."""
        return int(self._read("local_process_index"))

    @property
    def is_main_process(self) -> bool:
        """True on process 0."""
        return bool(self._read("is_main_process"))

    @property
    def is_local_main_process(self) -> bool:
        """True on the first process of every host."""
        return bool(self._read("is_local_main_process"))

    @property
    def is_last_process(self) -> bool:
        """True on the process with the highest index."""
        return bool(self._read("is_last_process"))

    @property
    def use_distributed(self) -> bool:
        """True in a job of several processes."""
        return self.num_processes > 1

    def wait_for_everyone(self) -> None:
        """Return when every process has called it."""
        self._job.wait_for_everyone()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Context: this process's part of a list, tuple, array, dataset or dict of them."""
        return self._job.split_between_processes(inputs, apply_padding)

    def main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on process 0, then on all others. Every process must enter it."""
        return self._job.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on the first process of every host, then on all others. Every process must enter it."""
        return self._job.local_main_process_first()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """print, once per host."""
        self._job.print(*args, **kwargs)

    def __repr__(self) -> str:
        if self._found() is None:
            return f"{type(self).__name__}(no job)"
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in self._known_attrs)})"


class PartialState(_View):
    """The job as this process sees it, also for scripts that make no Accelerator.

    Args:
        cpu: use the CPU even where an accelerator is present; only where this opens the job.

    Without an Accelerator it opens the job that `Accelerator()` would, so every process must then make it. Reading a property after
    `_reset_state` raises AttributeError until there is an Accelerator or PartialState again.
    """

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        if kwargs:
            raise UnsupportedError(
                f"PartialState cannot pass on {', '.join(sorted(kwargs))}: the engine connects the processes",
                'choose the engine and its settings by configuration, such as POLYACCEL_BACKEND="torch"',
            )
        global _own
        if jobs.accelerator() is None:
            _own = Accelerator(cpu=cpu or None)

    @staticmethod
    def _reset_state() -> None:
        """Start over, as if there were no job; what the Accelerators hold stays as it is."""
        global _own
        _own = None
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


class AcceleratorState(_View):
    """PartialState, and the precision that the script's Accelerator computes in.

    Raises NotStartedError (a ValueError) before the first Accelerator, and ConfigError where `mixed_precision` or `cpu` contradict it:
    they are settings of the Accelerator.
    """

    _known_attrs = (*_View._known_attrs, "mixed_precision")

    def __init__(self, mixed_precision: str | None = None, cpu: bool = False) -> None:
        accelerator = self._job
        if mixed_precision is not None and mixed_precision != accelerator.mixed_precision:
            self._refuse("mixed_precision", mixed_precision, accelerator.mixed_precision)
        if cpu and accelerator.state.device_kind not in _HOSTS:
            self._refuse("cpu", True, False)

    @staticmethod
    def _refuse(name: str, given: object, actual: object) -> NoReturn:
        raise ConfigError(
            f"AcceleratorState got {name}={given!r}, and the Accelerator of this process has {actual!r}",
            f"give it to the Accelerator: Accelerator({name}={given!r})",
        )

    def _found(self) -> Accelerator | None:
        return _of_script()

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Start over, as if the script had made no Accelerator; PartialState keeps its job unless it is reset too."""
        found = jobs.accelerator()
        if found is not None:
            _hidden.add(found)
        if reset_partial_state:
            PartialState._reset_state()

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return str(self._read("mixed_precision"))


class GradientState:
    """When gradients are exchanged, as the newest Accelerator counts; in a script without one, every batch is a real one."""

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
