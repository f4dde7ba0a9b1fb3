"""What one program learns of the mesh while it is traced: sums over data shards (`polyaccel::sum_over_shards`), parts of sequences.

A replica program runs once per data shard. What crosses the shards is asked of the engine (`ShardCall.sum_over_shards`); where a
program sees the whole batch nothing crosses, and the sum over shards is the value itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from polyaccel.protocols import ShardCall

_library = torch.library.Library("polyaccel", "FRAGMENT")
_library.define("sum_over_shards(Tensor values) -> Tensor")
_call: ContextVar[ShardCall | None] = ContextVar("shard_call", default=None)


@torch.library.register_fake("polyaccel::sum_over_shards", lib=_library)
def _fake(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)


class SumOverShards(torch.autograd.Function):
    """The sum of a value over all data shards. Every shard's sum moves with every shard's value: the gradient is a sum again."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.polyaccel.sum_over_shards(values)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = SumOverShards.apply(grad)
        return result


@contextlib.contextmanager
def shared_by(shard_call: ShardCall | None) -> Iterator[None]:
    """While traced inside, values are summed over the shards by this engine's function; None: there is one shard."""
    token = _call.set(shard_call)
    try:
        yield
    finally:
        _call.reset(token)


def sum_now(value: Any) -> Any:
    """The sum of a jax value over the shards of the program that is being traced."""
    call = _call.get()
    return value if call is None else call.sum_over_shards(value)


def num_sequence_parts() -> int:
    """In how many parts, one after the other, the sequences of the program that is being traced lie on devices."""
    call = _call.get()
    return 1 if call is None else call.num_sequence_parts
