"""Where a process stands in its job, and which process does what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from polyaccel import processes
from polyaccel.distribution import DistributedType, distributed_type_of
from polyaccel.errors import PrepareError
from polyaccel.facade.parts import Parts
from polyaccel.facade.state import AcceleratorState
from polyaccel.looking.bars import print_above

P = ParamSpec("P")
R = TypeVar("R")


class Places(Parts):
    """The job as this process sees it."""

    said_distributed_type: DistributedType | None = None  # what the script has written over it

    @cached_property
    def state(self) -> AcceleratorState:
        """The processes and devices of the job, seen from here."""
        return AcceleratorState.of(self)

    @property
    def distributed_type(self) -> DistributedType:
        """How the job is spread, in Accelerate's one word for it; see `polyaccel.distribution`."""
        return self.said_distributed_type or distributed_type_of(self.backend, self._engine.topology, self.plan)

    @property
    def device(self) -> Any:
        """Where the script puts its own tensors: a torch.device in a torch script on every engine, a jax.Device in a flax one."""
        bridge = self._prepared.script_bridge
        return self._engine.device if bridge is None else bridge.device(self._engine)

    @property
    def num_processes(self) -> int:
        """Operating-system processes of the job (torch: one per device; xla and jax: one per host)."""
        return self._engine.topology.num_processes

    @property
    def process_index(self) -> int:
        """This process, from 0."""
        return self._engine.topology.process_index

    @property
    def local_process_index(self) -> int:
        """This process on its host, from 0."""
        return self._engine.topology.local_process_index

    @property
    def num_data_shards(self) -> int:
        """Data-parallel replicas of the job: global batch = batch_size of a loader x num_data_shards."""
        return self.plan.num_data_shards

    @property
    def is_main_process(self) -> bool:
        """True on process 0."""
        return self._engine.topology.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """True on the first process of every host."""
        return self._engine.topology.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """True on the process with the highest index."""
        return self._engine.topology.is_last_process

    @property
    def use_distributed(self) -> bool:
        """True when more than one data shard trains together."""
        return self.plan.num_data_shards > 1

    def wait_for_everyone(self) -> None:
        """Return when every process has called it."""
        self._engine.collectives.barrier("polyaccel.wait_for_everyone")

    def set_trigger(self) -> None:
        """Raise a flag on this process, for the next `check_trigger` of all processes. Exchanges nothing."""
        self._trigger.set()

    def check_trigger(self) -> bool:
        """True on every process if any of them has called `set_trigger` since a check last found one; the flags are then down again.

        Every process must call it, equally often: it exchanges one flag.
        """
        return self._trigger.check()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """print, once per host, above the progress bars that are up."""
        if self.is_local_main_process:
            print_above(*args, **kwargs)

    @property
    def on_main_process(self) -> processes.MainProcessOnly:
        """Decorator: runs on process 0 only; None elsewhere. Also a context, for calls on an unwrapped tracker."""
        return processes.MainProcessOnly(lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: runs on the first process of every host only."""
        return processes.only_if(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: runs on the last process only."""
        return processes.only_if(lambda: self.is_last_process, function)

    def on_process(self, function: Callable[P, R] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on process `process_index` only; usable as `@accelerator.on_process(process_index=2)`."""
        if process_index is None:
            raise PrepareError("on_process needs a process_index", "write @accelerator.on_process(process_index=0)")
        if function is None:
            return lambda wrapped: self.on_process(wrapped, process_index)
        return processes.only_if(lambda: self.process_index == process_index, function)

    def on_local_process(self, function: Callable[P, R] | None = None, local_process_index: int | None = None) -> Any:
        """Decorator: runs on process `local_process_index` of every host only."""
        if local_process_index is None:
            raise PrepareError(
                "on_local_process needs a local_process_index",
                "write @accelerator.on_local_process(local_process_index=0)",
            )
        if function is None:
            return lambda wrapped: self.on_local_process(wrapped, local_process_index)
        return processes.only_if(lambda: self.local_process_index == local_process_index, function)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The block runs on process 0, then on all others. Every process must enter it."""
        with processes.one_first(self.is_main_process, self._engine.collectives.barrier):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The block runs on the first process of every host, then on all others. Every process must enter it."""
        with processes.one_first(self.is_local_main_process, self._engine.collectives.barrier):
            yield

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of a list, tuple, array, dataset or dict of them; see `processes.split`."""
        yield processes.split(
            inputs, index=self.process_index, num_processes=self.num_processes, apply_padding=apply_padding
        )
