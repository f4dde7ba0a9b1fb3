"""Values that the data shards of one program share: `polyaccel::sum_over_shards`, and who computes it while a program is traced.

A replica program runs once per data shard. What crosses the shards is asked of the engine (`ShardCall.sum_over_shards`); where a
program sees the whole batch nothing crosses, and the sum over shards is the value itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

Sum = Callable[[Any], Any]

_library = torch.library.Library("polyaccel", "FRAGMENT")
_library.define("sum_over_shards(Tensor values) -> Tensor")
_sum: ContextVar[Sum | None] = ContextVar("sum_over_shards", default=None)


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
def shared_by(sum_over_shards: Sum | None) -> Iterator[None]:
    """While traced inside, values are summed over the shards by this function; None: there is one shard."""
    token = _sum.set(sum_over_shards)
    try:
        yield
    finally:
        _sum.reset(token)


def sum_now(value: Any) -> Any:
    """The sum of a jax value over the shards of the program that is being traced."""
    function = _sum.get()
    return value if function is None else function(value)
