"""Host values between the processes of a gloo group. Each exchange begins with who called what, so that a mistake is no hang."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyaccel import wire
from polyaccel.agreement import require_equal
from polyaccel.collective_calls import LOOK_S, Call, CollectiveCalls, different_calls
from polyaccel.errors import CollectiveError

# Renamed in torch 2.13, where the old name warns.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_DIGEST, _SIZE, _WORDS, _SMALL = (
    8,
    8,
    176,
    192,
)  # bytes of a row: what must be equal, size of the object, the call in words, the object
_ROW = _DIGEST + _SIZE + _WORDS + _SMALL
_SLICE = timedelta(seconds=LOOK_S)


class HostExchange:
    """Operations between `num_processes` processes on `group`, which training does not use. `calls` knows them all."""

    def __init__(self, group: Any, num_processes: int, calls: CollectiveCalls) -> None:
        self.group = group
        self.calls = calls
        self._num_processes = num_processes

    def meet(self, call: Call, data: bytes = b"", *, of_tensors: bool = False) -> list[tuple[int, bytes]]:
        """Wait for every process, and give (size, first bytes) of everyone's data. Inside of an operation of `calls`.

        Raises CollectiveError, on every process, where the others have begun another operation, or with other details: those
        `of_tensors` are shape and dtype.
        """
        equal = "\n".join((call.name, call.operation, call.detail)).encode()
        words = "\n".join((call.name, call.place, call.operation, call.detail)).encode()[:_WORDS]
        row = hashlib.blake2b(equal, digest_size=_DIGEST).digest() + len(data).to_bytes(_SIZE, "little")
        row += words.ljust(_WORDS, b"\0") + data[:_SMALL].ljust(_SMALL, b"\0")
        rows = self._gather(torch.frombuffer(bytearray(row), dtype=torch.uint8)).view(self._num_processes, _ROW)
        found = [bytes(one.numpy()) for one in rows]
        if len({one[:_DIGEST] for one in found}) > 1:
            _refuse([_call_of(one) for one in found], of_tensors)
        start = _DIGEST + _SIZE + _WORDS
        return [(int.from_bytes(one[_DIGEST : _DIGEST + _SIZE], "little"), one[start:]) for one in found]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order; see `polyaccel.wire`."""
        data = wire.encode(value)
        with self.calls("all_gather_object") as call:
            met = self.meet(call, data)
            sizes = [size for size, _ in met]
            if max(sizes) <= _SMALL:
                return [wire.decode(first[:size]) for size, first in met]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            rows = self._gather(padded).view(self._num_processes, -1)
        return [wire.decode(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self, tag: str) -> None:
        """Return when every process is at the barrier of this name."""
        with self.calls("barrier", tag) as call:
            self.meet(call)

    def wait(self, work: Any) -> None:
        """Return when an exchange is complete; meanwhile, look where the others are."""
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise self.calls.failed(error) from error
            self.calls.look()

    def run(self, exchange: Any, *args: Any) -> None:
        """Start an exchange of torch.distributed on this group, and `wait` for it."""
        try:
            work = exchange(*args, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.calls.failed(error) from error
        self.wait(work)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self._num_processes * tensor.numel())
        self.run(all_gather_single, gathered, tensor)
        return gathered


def _call_of(row: bytes) -> Call:
    words = row[_DIGEST + _SIZE : _DIGEST + _SIZE + _WORDS].rstrip(b"\0").decode("utf-8", "replace")
    name, place, operation, detail = [*words.split("\n"), "", "", ""][:4]
    return Call(name, place, operation, detail)


def _refuse(calls: list[Call], of_tensors: bool) -> None:
    """Raises what is wrong, in the same words on every process."""
    if of_tensors and len({(call.name, call.operation) for call in calls}) == 1:
        require_equal(
            f"{calls[0].operation} needs tensors of one shape and dtype on all processes",
            [call.detail for call in calls],
            "use accelerator.pad_across_processes first",
        )
    raise CollectiveError(*different_calls(dict(enumerate(calls))))
