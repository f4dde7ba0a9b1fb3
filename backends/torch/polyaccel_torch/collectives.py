"""Exchange of tensors and plain values between processes, with arguments checked before data moves: a mistake is no hang."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from polyaccel import wire
from polyaccel.agreement import require_equal
from polyaccel.errors import LaunchError, UnsupportedError
from polyaccel.store import MemoryStore
from polyaccel_torch.dialect.stores import GroupStore

# Renamed in torch 2.13, where the old name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class ProcessCollectives:
    """Between the processes of a joined job. `host_group` is a gloo group over all of them, None for the default group."""

    def __init__(self, num_processes: int, host_group: Any, timeout: timedelta) -> None:
        self._num_processes = num_processes
        self._host_group = host_group
        self._timeout = timeout

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenated along dim 0; a scalar gives shape (num_processes,). Raises UnsupportedError for unequal shapes."""
        tensor = _detached(tensor)
        self._check_equal(tensor, "all_gather")
        part = _on_wire(tensor.reshape(1) if not tensor.dim() else tensor)
        gathered = part.new_empty((self._num_processes * part.shape[0], *part.shape[1:]))
        _all_gather_single(gathered, part, group=self._group_for(part))
        return gathered.view(tensor.dtype) if tensor.dtype == torch.bool else gathered

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "mean", "max", "min"]) -> torch.Tensor:
        """Reduced elementwise; a new tensor. Booleans are counted by "sum" and "mean"."""
        tensor = _detached(tensor)
        self._check_equal(tensor, "all_reduce")
        is_flag = tensor.dtype == torch.bool
        if is_flag and operation in ("sum", "mean"):
            tensor = tensor.long()
        reduced = _on_wire(tensor).clone()
        dist.all_reduce(reduced, _OPERATIONS[operation], group=self._group_for(reduced))
        if operation == "mean":
            return reduced / self._num_processes
        return reduced.bool() if is_flag and operation != "sum" else reduced

    def broadcast(self, tensor: torch.Tensor, from_process: int) -> torch.Tensor:
        """The tensor of one process; a new tensor. Shapes and dtypes must be equal."""
        tensor = _detached(tensor)
        self._check_equal(tensor, "broadcast")
        sent = _on_wire(tensor).clone()
        dist.broadcast(sent, from_process, group=self._group_for(sent))
        return sent.bool() if tensor.dtype == torch.bool else sent

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order; see `polyaccel.wire`."""
        message = torch.frombuffer(bytearray(wire.encode(value)), dtype=torch.uint8)
        sizes = self._gather_on_host(torch.tensor([message.numel()])).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: message.numel()] = message
        rows = self._gather_on_host(padded).view(self._num_processes, -1)
        return [wire.decode(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self, tag: str) -> None:
        """Return when every process is at the barrier of this name. Raises LaunchError, naming it, when one does not come."""
        try:
            dist.monitored_barrier(self._host_group, self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise LaunchError(
                f"not every process came to the barrier {tag!r} within {self._timeout.total_seconds():g} s: {error}",
                "look for an earlier error in the other processes, or for a call that only some of them make",
            ) from error
        tags = self.all_gather_object(tag)
        if len(set(tags)) > 1:
            places = ", ".join(f"process {index} at {name!r}" for index, name in enumerate(tags))
            raise LaunchError(
                f"the processes wait at different barriers: {places}", "make every process take the same path"
            )

    def store(self) -> GroupStore:
        """A connection of its own to the store through which the processes found each other."""
        return GroupStore()  # also where the script made the group itself

    def mean_and_sum(
        self, means: list[torch.Tensor], sums: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """0-d tensors averaged, and 0-d tensors added up, over processes in one exchange that does not wait for the device."""
        together = torch.stack([tensor.detach().double() for tensor in (*means, *sums)])
        dist.all_reduce(together, group=self._group_for(together))
        together[: len(means)] /= self._num_processes
        results = [value.to(tensor.dtype) for value, tensor in zip(together.unbind(), (*means, *sums), strict=True)]
        return results[: len(means)], results[len(means) :]

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors, equal in number, shapes and dtypes on all processes, by their mean, in place."""
        if not tensors:
            return
        torch._foreach_div_(tensors, self._num_processes)  # before they are added up: float16 sums could overflow
        parts = [tensor.contiguous() for tensor in tensors]  # itself, where it is
        exchanges = [dist.all_reduce(part, group=self._group_for(part), async_op=True) for part in parts]
        for exchange in exchanges:
            if exchange is not None:
                exchange.wait()
        for tensor, part in zip(tensors, parts, strict=True):
            if part is not tensor:
                tensor.copy_(part)

    def _group_for(self, tensor: torch.Tensor) -> Any:
        return self._host_group if tensor.device.type == "cpu" else None  # NCCL takes no tensors in host memory

    def _gather_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self._num_processes * tensor.numel())
        _all_gather_single(gathered, tensor, group=self._host_group)
        return gathered

    def _check_equal(self, tensor: torch.Tensor, operation: str) -> None:
        """Raises UnsupportedError on every process when shapes or dtypes differ. On the host: the device is not waited for."""
        mine = f"{tuple(tensor.shape)} {tensor.dtype}".encode().ljust(64)
        if len(mine) > 64:
            raise UnsupportedError(f"{operation} got a tensor of {tensor.dim()} dimensions", "reshape it to fewer")
        gathered = self._gather_on_host(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        rows = [bytes(row.numpy()).decode().strip() for row in gathered.view(self._num_processes, 64)]
        require_equal(
            f"{operation} needs tensors of one shape and dtype on all processes",
            rows,
            "use accelerator.pad_across_processes first",
        )


class SingleCollectives:
    """The same operations in a job of one process."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, a scalar with shape (1,)."""
        return tensor.reshape(1) if not tensor.dim() else tensor

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "mean", "max", "min"]) -> torch.Tensor:
        """A copy."""
        return tensor.clone()

    def broadcast(self, tensor: torch.Tensor, from_process: int) -> torch.Tensor:
        """A copy."""
        return tensor.clone()

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value, as the wire would give it back."""
        return [wire.decode(wire.encode(value))]

    def average(self, tensors: list[torch.Tensor]) -> None:
        """They are their mean."""

    def barrier(self, tag: str) -> None:
        """Nobody to wait for."""

    def store(self) -> MemoryStore:
        """Nobody to share it with."""
        return MemoryStore()

    def mean_and_sum(
        self, means: list[torch.Tensor], sums: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors themselves, detached."""
        return [tensor.detach() for tensor in means], [tensor.detach() for tensor in sums]


def _detached(value: Any) -> torch.Tensor:
    """A tensor without its graph; a numpy array, which other engines take as well, as a tensor."""
    return torch.as_tensor(value).detach()


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that gloo and NCCL take: contiguous, and bytes instead of booleans."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
