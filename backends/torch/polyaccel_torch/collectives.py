"""Exchange of tensors and plain values between processes, with arguments checked before data moves: a mistake is no hang."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from polyaccel import wire
from polyaccel.collective_calls import Call, CollectiveCalls
from polyaccel.errors import UnsupportedError
from polyaccel.store import MemoryStore
from polyaccel_torch.dialect.host_exchange import HostExchange, all_gather_single
from polyaccel_torch.dialect.stores import GroupStore

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class ProcessCollectives:
    """Between the processes of a joined job. `host` is a gloo group of its own over all of them: training uses the default one."""

    def __init__(self, num_processes: int, host: HostExchange) -> None:
        self.calls = host.calls
        self.is_uneven = False  # some processes may have run out of batches; see `joining`
        self._num_processes = num_processes
        self._host = host
        self._subsets: dict[tuple[int, ...], SubsetCollectives] = {}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenated along dim 0; a scalar gives shape (num_processes,). Raises CollectiveError for unequal shapes."""
        tensor = _detached(tensor)
        with self.calls("all_gather", _described(tensor)) as call:
            self._meet(call)
            part = _on_wire(tensor.reshape(1) if not tensor.dim() else tensor)
            gathered = part.new_empty((self._num_processes * part.shape[0], *part.shape[1:]))
            self._run(part, all_gather_single, gathered, part)
        return gathered.view(tensor.dtype) if tensor.dtype == torch.bool else gathered

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "mean", "max", "min"]) -> torch.Tensor:
        """Reduced elementwise; a new tensor. Booleans are counted by "sum" and "mean"."""
        tensor = _detached(tensor)
        with self.calls(f"all_reduce({operation})", _described(tensor)) as call:
            self._meet(call)
            is_flag = tensor.dtype == torch.bool
            if is_flag and operation in ("sum", "mean"):
                tensor = tensor.long()
            reduced = _on_wire(tensor).clone()
            self._run(reduced, dist.all_reduce, reduced, _OPERATIONS[operation])
        if operation == "mean":
            return reduced / self._num_processes
        return reduced.bool() if is_flag and operation != "sum" else reduced

    def broadcast(self, tensor: torch.Tensor, from_process: int) -> torch.Tensor:
        """The tensor of one process; a new tensor. Shapes and dtypes must be equal."""
        tensor = _detached(tensor)
        with self.calls(f"broadcast(from_process={from_process})", _described(tensor)) as call:
            self._meet(call)
            sent = _on_wire(tensor).clone()
            self._run(sent, dist.broadcast, sent, from_process)
        return sent.bool() if tensor.dtype == torch.bool else sent

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order; see `polyaccel.wire`."""
        return self._host.all_gather_object(value)

    def barrier(self, tag: str) -> None:
        """Return when every process is at the barrier of this name. Raises CollectiveError, naming it, when one does not come."""
        self._host.barrier(tag)

    def store(self) -> GroupStore:
        """A connection of its own to the store through which the processes found each other."""
        return GroupStore()  # also where the script made the group itself

    def among(self, processes: tuple[int, ...]) -> SubsetCollectives:
        """Exchanges between some of the processes, which alone have to call this and them."""
        if processes not in self._subsets:
            timeout_s = self.calls.timeout_s
            group = dist.new_group(
                list(processes), timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=True
            )
            calls = CollectiveCalls(timeout_s=timeout_s)  # not of the path that all processes share
            host = HostExchange(group, len(processes), calls)
            self._subsets[processes] = SubsetCollectives(ProcessCollectives(len(processes), host))
        return self._subsets[processes]

    def mean_and_sum(
        self, means: list[torch.Tensor], sums: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """0-d tensors averaged, and 0-d tensors added up, over processes in one exchange that does not wait for the device.

        Raises UnsupportedError where processes may have run out of batches, which would not answer.
        """
        if self.is_uneven:
            raise UnsupportedError(
                "inside join_uneven_inputs with even_batches=False this call needs a number from every process, and some may have used"
                " up their batches",
                "use accelerator.backward(loss) with the value of a loss, and no weight; or even_batches=True",
            )
        together = torch.stack([tensor.detach().double() for tensor in (*means, *sums)])
        dist.all_reduce(together, group=self._training_group(together))
        together[: len(means)] /= self._num_processes
        results = [value.to(tensor.dtype) for value, tensor in zip(together.unbind(), (*means, *sums), strict=True)]
        return results[: len(means)], results[len(means) :]

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors, equal in number, shapes and dtypes on all processes, by their mean, in place."""
        if not tensors:
            return
        torch._foreach_div_(tensors, self._num_processes)  # before they are added up: float16 sums could overflow
        parts = [tensor.contiguous() for tensor in tensors]  # itself, where it is
        exchanges = [dist.all_reduce(part, group=self._training_group(part), async_op=True) for part in parts]
        for exchange in exchanges:
            if exchange is not None:
                exchange.wait()
        for tensor, part in zip(tensors, parts, strict=True):
            if part is not tensor:
                tensor.copy_(part)

    def _training_group(self, tensor: torch.Tensor) -> Any:
        is_served = tensor.device.type != "cpu" or dist.get_backend() == "gloo"
        return None if is_served else self._host.group  # NCCL takes no tensors in host memory

    def _meet(self, call: Call) -> None:
        """Raises CollectiveError on every process when calls, shapes or dtypes differ. On the host: the device is not waited for."""
        self._host.meet(call, of_tensors=True)

    def _run(self, tensor: torch.Tensor, exchange: Any, *args: Any) -> None:
        if tensor.device.type == "cpu":
            self._host.run(exchange, *args)
        else:
            exchange(*args)  # in the order of the device's work: every process has come, so none waits for ever


class SubsetCollectives:
    """What a part of the processes exchanges, through host memory: NCCL groups are for what every step does."""

    def __init__(self, between: ProcessCollectives) -> None:
        self._between = between

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenated along dim 0 over these processes, on the tensor's own device."""
        return self._between.all_gather(tensor.cpu()).to(tensor.device)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of these processes, in their order."""
        return self._between.all_gather_object(value)


class SingleCollectives:
    """The same operations in a job of one process."""

    def __init__(self) -> None:
        self.calls = CollectiveCalls()
        self.is_uneven = False

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


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that gloo and NCCL take: contiguous, and bytes instead of booleans."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
