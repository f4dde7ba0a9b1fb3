"""`accelerator.state`, Accelerate's AcceleratorState: the job and the precision as one Accelerator has them."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from polyaccel import jobs
from polyaccel.distribution import DistributedType
from polyaccel.errors import ConfigError, NotStartedError, UnsupportedError
from polyaccel.protocols import Engine
from polyaccel.topology import Topology

_HOSTS = ("cpu", "numpy")


class _Snapshot:
    """`PartialState._shared_state`: what a state says now, by name; empty before the first and after a reset."""

    def __get__(self, instance: object, owner: type[JobView]) -> dict[str, Any]:
        view = object.__new__(owner)
        return {} if view._found() is None else {name: getattr(view, name) for name in owner._known_attrs}


class JobView:
    """What PartialState and AcceleratorState have in common."""

    _known_attrs: tuple[str, ...] = (
        "device",
        "distributed_type",
        "local_process_index",
        "num_processes",
        "process_index",
    )
    _shared_state = _Snapshot()

    def _found(self) -> Any:
        """The Accelerator that it speaks of, or None."""
        return jobs.accelerator()

    @property
    def _job(self) -> Any:
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
        return getattr(accelerator, name)

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
        """How the job is spread; see `polyaccel.distribution`."""
        kind: DistributedType = self._read("distributed_type")
        return kind

    @distributed_type.setter
    def distributed_type(self, value: DistributedType) -> None:
        """Say another word, as scripts of Accelerate can: it is what they read then, and changes nothing else."""
        self._job.said_distributed_type = value

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

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the job: the connections to the other processes end. Idempotent; every process should call it.

        Raises UnsupportedError for a `group` of the script's own.
        """
        if group is not None:
            raise UnsupportedError(
                "destroy_process_group(group): only the job's own is known", "destroy yours where you made it"
            )
        for engine in jobs.engines():
            engine.close()

    @property
    def debug(self) -> bool:
        """Whether collectives are compared between processes before they run. May be set, on every process alike."""
        return bool(self._job._gathering.debug)

    @debug.setter
    def debug(self, value: bool) -> None:
        self._job._gathering.debug = bool(value)

    def __repr__(self) -> str:
        if self._found() is None:
            return f"{type(self).__name__}(no job)"
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in self._known_attrs)})"


class _Retired:
    """What an Accelerator has in place of its job after `AcceleratorState._reset_state()`: it may still say whether this is the main
    process, and end the training, as long as the job itself was not reset."""

    def __init__(self, engine: Engine | None = None) -> None:
        if engine is not None:
            self.topology, self.synchronize, self.close = (
                _RetiredPlace(engine.topology),
                engine.synchronize,
                engine.close,
            )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"`AcceleratorState` object has no attribute `{name}`. This happens if `AcceleratorState._reset_state()` was called and an"
            " Accelerator from before is still in use: make a new one."
        )


class _RetiredPlace(_Retired):
    """Of the topology what PartialState says in Accelerate, which such a reset leaves alone."""

    def __init__(self, topology: Topology) -> None:
        self.is_main_process = topology.is_main_process
        self.is_local_main_process = topology.is_local_main_process
        self.is_last_process = topology.is_last_process


class AcceleratorState(JobView):
    """PartialState, and the precision that the script's Accelerator computes in.

    `AcceleratorState()` speaks of the newest Accelerator, `accelerator.state` of that one. Raises NotStartedError (a ValueError) before
    the first Accelerator, and ConfigError where `mixed_precision` or `cpu` contradict it: they are settings of the Accelerator.
    """

    deepspeed_plugin = None  # what many scripts ask before they do what DeepSpeed wants

    _known_attrs = (*JobView._known_attrs, "mixed_precision")
    _bound: weakref.ref[Any] | None = None

    def __init__(self, mixed_precision: str | None = None, cpu: bool = False) -> None:
        accelerator = self._job
        if mixed_precision is not None and mixed_precision != accelerator.mixed_precision:
            self._refuse("mixed_precision", mixed_precision, accelerator.mixed_precision)
        if cpu and self.device_kind not in _HOSTS:
            self._refuse("cpu", True, False)

    @classmethod
    def of(cls, accelerator: Any) -> AcceleratorState:
        """The state of this Accelerator; of the newest one after a reset."""
        self = object.__new__(cls)
        self._bound = weakref.ref(accelerator)
        return self

    @staticmethod
    def _refuse(name: str, given: object, actual: object) -> NoReturn:
        raise ConfigError(
            f"AcceleratorState got {name}={given!r}, and the Accelerator of this process has {actual!r}",
            f"give it to the Accelerator: Accelerator({name}={given!r})",
        )

    def _found(self) -> Any:
        own = None if self._bound is None else self._bound()
        if own is not None and not isinstance(own._engine, _Retired):
            return own
        return jobs.of_script()

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Start over, as if the script had made no Accelerator. Those that it made raise AttributeError where they need their job.

        PartialState opens the job again where it is asked, unless it is reset too.
        """
        newest = jobs.of_script()
        for accelerator in jobs.accelerators():
            if accelerator is not jobs.kept():
                is_over = reset_partial_state or not hasattr(accelerator._engine, "topology")
                accelerator._engine = accelerator._prepared = _Retired(None if is_over else accelerator._engine)
        jobs.retire()
        if reset_partial_state:
            jobs.forget()
        elif newest is not None:
            kind, backend, cpu = type(newest), newest.backend, newest.config.cpu
            jobs.keep(lambda: kind(backend=backend, cpu=cpu))

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return str(self._read("mixed_precision"))

    @property
    def num_devices(self) -> int:
        """Devices of the job."""
        return int(self._job._engine.topology.num_devices)

    @property
    def num_local_devices(self) -> int:
        """Devices that this process drives."""
        return int(self._job._engine.topology.num_local_devices)

    @property
    def device_kind(self) -> str:
        """What the devices are: "cpu", "cuda", or the name that the driver gives them."""
        return str(self._job._engine.topology.device_kind)
