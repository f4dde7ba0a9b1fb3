"""Between hosts. Device tensors are global values under SPMD and need no exchange; host values travel over gloo.

One process needs none of it. Several hosts follow PyTorch/XLA's documented way (a CPU process group beside SPMD); the host side
is tested between processes, the device side only on one host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from polyaccel import wire
from polyaccel.store import MemoryStore, Store
from polyaccel_torch.dialect.stores import GroupStore


class SpmdCollectives:
    """`flush` starts the pending device work: before a value is handed over, and before a process waits for others.

    A device tensor is the value of the whole job on every host already: gathering or reducing it gives it back. The script's
    own host tensors and objects differ between hosts and are exchanged.
    """

    def __init__(self, num_processes: int, flush: Callable[[], None]) -> None:
        self._num_processes = num_processes
        self._flush = flush

    def all_gather(self, array: Any) -> Any:
        """Host arrays of all processes along dim 0, a scalar as shape (num_processes,); a device tensor is global already."""
        if _is_on_device(array):
            self._flush()
            return array if array.dim() else array.expand(self._num_processes).clone()
        tensor = torch.as_tensor(array)
        if self._num_processes == 1:
            return array if tensor.dim() else tensor.reshape(1)
        tensor = tensor.reshape(1) if not tensor.dim() else tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._num_processes)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_reduce(self, array: Any, operation: str) -> Any:
        """Host arrays reduced elementwise over processes; a device tensor holds the value of the global batch already."""
        if _is_on_device(array):
            return array.clone()
        tensor = torch.as_tensor(array).clone()
        if self._num_processes == 1:
            return tensor
        kinds = {
            "sum": dist.ReduceOp.SUM,
            "mean": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
        }
        dist.all_reduce(tensor, kinds[operation])
        return tensor / self._num_processes if operation == "mean" else tensor

    def broadcast(self, array: Any, from_process: int) -> Any:
        """The host array of one process; a device tensor is the same on all of them."""
        if _is_on_device(array):
            return array.clone()
        tensor = torch.as_tensor(array).clone()
        if self._num_processes > 1:
            dist.broadcast(tensor, from_process)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order."""
        encoded = wire.encode(value)
        if self._num_processes == 1:
            return [wire.decode(encoded)]
        size = torch.tensor([len(encoded)])
        sizes = [torch.empty_like(size) for _ in range(self._num_processes)]
        dist.all_gather(sizes, size)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(encoded)] = torch.from_numpy(np.frombuffer(bytearray(encoded), np.uint8))
        parts = [torch.empty_like(padded) for _ in range(self._num_processes)]
        dist.all_gather(parts, padded)
        return [wire.decode(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def barrier(self, tag: str) -> None:
        """Return when every process has arrived; this host's pending device work is started before."""
        self._flush()
        if self._num_processes > 1:
            dist.barrier()

    def store(self) -> Store:
        """A connection of its own to the store through which the hosts found each other."""
        if self._num_processes == 1:
            return MemoryStore()
        return GroupStore()


def join(process_index: int, num_processes: int, address: str | None, port: int | None) -> bool:
    """Connect the hosts for host values; True if a group was made here, which `leave` ends.

    Without an address the runtime's own discovery (`xla://`, which knows TPU pods) finds process 0. A group that the script
    made itself is used as it is.
    """
    if num_processes == 1 or dist.is_initialized():
        return False
    if address is None:
        import torch_xla.distributed.xla_backend  # noqa: F401  (registers xla://)

        dist.init_process_group("gloo", init_method="xla://")
    else:
        dist.init_process_group(
            "gloo", init_method=f"tcp://{address}:{port}", rank=process_index, world_size=num_processes
        )
    return True


def leave() -> None:
    """End the group that `join` made."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_on_device(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.device.type == "xla"
