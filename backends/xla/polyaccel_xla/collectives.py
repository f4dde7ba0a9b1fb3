"""Between hosts. Device tensors are global values under SPMD and need no exchange; host values travel over gloo.

One process needs none of it. Several hosts follow PyTorch/XLA's documented way (a CPU process group beside SPMD); the host side
is tested between processes, the device side only on one host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyaccel import wire
from polyaccel.collective_calls import CollectiveCalls
from polyaccel.store import MemoryStore, Store
from polyaccel_torch.dialect.host_exchange import HostExchange
from polyaccel_torch.dialect.stores import GroupStore

_MARGIN = timedelta(minutes=1)  # our own deadline, which says who is missing, comes before gloo's


class SpmdCollectives:
    """`flush` starts the pending device work: before a value is handed over, and before a process waits for others.

    A device tensor is the value of the whole job on every host already: gathering or reducing it gives it back. The script's
    own host tensors and objects differ between hosts and are exchanged; a host that does not come is named.
    """

    def __init__(
        self, process_index: int, num_processes: int, flush: Callable[[], None], timeout_s: float = 1800.0
    ) -> None:
        self._num_processes = num_processes
        self._flush = flush
        self._host: HostExchange | None = None
        if num_processes > 1:
            calls = CollectiveCalls(process_index, num_processes, timeout_s=timeout_s, open_store=GroupStore)
            self._host = HostExchange(None, num_processes, calls)
        self.calls = CollectiveCalls() if self._host is None else self._host.calls

    def all_gather(self, array: Any) -> Any:
        """Host arrays of all processes along dim 0, a scalar as shape (num_processes,); a device tensor is global already."""
        if _is_on_device(array):
            self._flush()
            return array if array.dim() else array.expand(self._num_processes).clone()
        tensor = torch.as_tensor(array)
        if self._host is None:
            return array if tensor.dim() else tensor.reshape(1)
        with self.calls("all_gather", _described(tensor)) as call:
            self._host.meet(call, of_tensors=True)
            tensor = tensor.reshape(1) if not tensor.dim() else tensor.contiguous()
            parts = [torch.empty_like(tensor) for _ in range(self._num_processes)]
            self._host.run(dist.all_gather, parts, tensor)
        return torch.cat(parts)

    def all_reduce(self, array: Any, operation: str) -> Any:
        """Host arrays reduced elementwise over processes; a device tensor holds the value of the global batch already."""
        if _is_on_device(array):
            return array.clone()
        tensor = torch.as_tensor(array).clone()
        if self._host is None:
            return tensor
        kinds = {
            "sum": dist.ReduceOp.SUM,
            "mean": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
        }
        with self.calls(f"all_reduce({operation})", _described(tensor)) as call:
            self._host.meet(call, of_tensors=True)
            self._host.run(dist.all_reduce, tensor, kinds[operation])
        return tensor / self._num_processes if operation == "mean" else tensor

    def broadcast(self, array: Any, from_process: int) -> Any:
        """The host array of one process; a device tensor is the same on all of them."""
        if _is_on_device(array):
            return array.clone()
        tensor = torch.as_tensor(array).clone()
        if self._host is not None:
            with self.calls(f"broadcast(from_process={from_process})", _described(tensor)) as call:
                self._host.meet(call, of_tensors=True)
                self._host.run(dist.broadcast, tensor, from_process)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order."""
        if self._host is None:
            return [wire.decode(wire.encode(value))]
        return self._host.all_gather_object(value)

    def barrier(self, tag: str) -> None:
        """Return when every process has arrived; this host's pending device work is started before."""
        self._flush()
        if self._host is not None:
            self._host.barrier(tag)

    def store(self) -> Store:
        """A connection of its own to the store through which the hosts found each other."""
        if self._num_processes == 1:
            return MemoryStore()
        return GroupStore()


def join(
    process_index: int, num_processes: int, address: str | None, port: int | None, timeout_s: float = 1800.0
) -> bool:
    """Connect the hosts for host values; True if a group was made here, which `leave` ends.

    Without an address the runtime's own discovery (`xla://`, which knows TPU pods) finds process 0. A group that the script
    made itself is used as it is.
    """
    if num_processes == 1 or dist.is_initialized():
        return False
    timeout = timedelta(seconds=timeout_s) + _MARGIN
    if address is None:
        import torch_xla.distributed.xla_backend  # noqa: F401  (registers xla://)

        dist.init_process_group("gloo", init_method="xla://", timeout=timeout)
    else:
        dist.init_process_group(
            "gloo", init_method=f"tcp://{address}:{port}", rank=process_index, world_size=num_processes, timeout=timeout
        )
    return True


def leave() -> None:
    """End the group that `join` made."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_on_device(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.device.type == "xla"


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
