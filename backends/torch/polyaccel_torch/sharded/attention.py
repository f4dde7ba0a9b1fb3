"""Attention over heads that lie on different processes: what torch's DTensor has no rule for.

That is the CPU's kernel (batch and heads are independent in it, so pieces along either give pieces of the result; rules for the kernels
of GPUs are torch's own), and a cache of keys and values that begins as an empty tensor of one dim, as transformers' do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_INDEPENDENT = (0, 1)  # dims of (batch, heads, seq, dim) and of (batch, heads, seq)


@functools.cache
def split_attention_by_heads() -> None:
    """Tell DTensor how to compute scaled_dot_product_attention on the CPU, forward and backward, and how to extend a cache; once in
    a process."""
    aten = torch.ops.aten
    register_sharding(aten._scaled_dot_product_flash_attention_for_cpu.default)(_forward)
    register_sharding(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)(_backward)
    register_sharding(aten.cat.default)(_joined)


def _forward(query: Any, key: Any, value: Any, *options: Any, attn_mask: Any = None, scale: Any = None) -> Any:
    rules = []
    for place in (Replicate(), *map(Shard, _INDEPENDENT)):
        mask = [] if attn_mask is None else [_of_mask(attn_mask, place)]
        rules.append(([place] * 2, [place] * 3 + [None] * len(options) + mask))
    return rules


def _backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    sums: Any,
    *options: Any,
    attn_mask: Any = None,
    scale: Any = None,
) -> Any:
    rules = []
    for place in (Replicate(), *map(Shard, _INDEPENDENT)):
        mask = [] if attn_mask is None else [_of_mask(attn_mask, place)]
        rules.append(([place] * 3, [place] * 6 + [None] * len(options) + mask))
    return rules


def _of_mask(mask: Any, place: Any) -> Any:
    """Cut as the queries are where the mask has that dim; whole where it is broadcast along it, or has fewer dims."""
    if isinstance(place, Replicate) or len(mask.shape) < 4 or mask.shape[place.dim] == 1:
        return Replicate()
    return place


def _joined(tensors: Any, dim: int = 0) -> Any:
    """torch's own rule takes the dims of the first tensor for those of all, which is wrong where that is a legacy empty one."""
    num_dims = max(len(tensor.shape) for tensor in tensors)
    rules: list[Any] = [([Replicate()], [Replicate()] * len(tensors))]
    for free in range(num_dims):
        if free != dim % num_dims:
            place = Shard(free)
            rules.append(([place], [place if len(tensor.shape) == num_dims else Replicate() for tensor in tensors]))
    return rules
