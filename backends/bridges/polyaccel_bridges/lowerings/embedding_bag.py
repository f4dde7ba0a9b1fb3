"""Look-ups that are summed, averaged or maximized per bag. Which bag an index belongs to is computed from the offsets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .table import lowers

aten = torch.ops.aten

_SUM, _MEAN, _MAX = 0, 1, 2


def _bags(indices: jax.Array, offsets: jax.Array) -> jax.Array:
    """The bag of every index; bags before the first offset do not exist, so the last offset <= position decides."""
    positions = jnp.arange(indices.shape[0], dtype=offsets.dtype)
    return (jnp.searchsorted(offsets, positions, side="right") - 1).astype(np.int32)


def _per_index(
    bags: jax.Array,
    indices: jax.Array,
    mode: int,
    num_bags: int,
    weights: jax.Array | None,
    padding_idx: int,
    dtype: np.dtype,
) -> tuple[jax.Array, jax.Array]:
    """The factor of every looked-up row in its bag's sum, and the number of rows in every bag."""
    counted = indices != padding_idx if padding_idx >= 0 else jnp.ones(indices.shape, np.bool_)
    counts = jnp.zeros(num_bags, indices.dtype).at[bags].add(counted.astype(indices.dtype))
    factor = counted.astype(dtype)
    if mode == _MEAN:
        factor = factor / jnp.maximum(counts, 1).astype(dtype)[bags]
    return (factor if weights is None else factor * weights), counts


def _records_bags(weight: jax.Array, mode: int, padding_idx: int) -> bool:
    """PyTorch's summing kernels for 32-bit and float16 tables leave `offset2bag` empty; shapes follow it, our backward does not."""
    return mode != _SUM or padding_idx >= 0 or weight.dtype not in (np.float32, np.float16)


@lowers(aten._embedding_bag.default)
def _embedding_bag(
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    starts = offsets[:-1] if include_last_offset else offsets
    num_bags = starts.shape[0]
    bags = _bags(indices, starts)
    rows = weight[indices]
    factor, counts = _per_index(bags, indices, mode, num_bags, per_sample_weights, padding_idx, weight.dtype)
    offset2bag = bags.astype(offsets.dtype) if _records_bags(weight, mode, padding_idx) else jnp.zeros(0, offsets.dtype)
    counts = counts.astype(offsets.dtype)
    if mode != _MAX:
        out = jnp.zeros((num_bags, weight.shape[1]), weight.dtype).at[bags].add(rows * factor[:, None])
        return out, offset2bag, counts, counts
    lowest = jnp.asarray(-np.inf, weight.dtype)
    rows = jnp.where(factor[:, None] > 0, rows, lowest)
    top = jnp.full((num_bags, weight.shape[1]), lowest).at[bags].max(rows)
    # The first row of the bag that reaches the maximum gets the gradient.
    last = indices.shape[0]
    position = jnp.arange(last, dtype=np.int32)[:, None]
    reached = jnp.where((rows == top[bags]) & (factor[:, None] > 0), position, last)
    first = jnp.full(top.shape, last, np.int32).at[bags].min(reached)
    empty = first == last
    chosen = jnp.where(empty, -1, indices[jnp.where(empty, 0, first)]).astype(offsets.dtype)
    return jnp.where(empty, jnp.zeros_like(top), top), offset2bag, counts, chosen


@lowers(aten._embedding_bag_forward_only.default)
def _embedding_bag_forward_only(
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    out, offset2bag, counts, chosen = _embedding_bag(
        weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx
    )
    return out, offset2bag, jnp.pad(counts, (0, int(include_last_offset))), chosen


@lowers(aten._embedding_bag_backward.default)
def _embedding_bag_backward(
    grad: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    offset2bag: jax.Array,
    bag_size: jax.Array,
    maximum_indices: jax.Array,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: jax.Array | None,
    padding_idx: int = -1,
) -> jax.Array:
    table = jnp.zeros((num_weights, grad.shape[1]), grad.dtype)
    if mode == _MAX:
        kept = jnp.where(maximum_indices >= 0, grad, jnp.zeros_like(grad))
        return table.at[jnp.maximum(maximum_indices, 0), jnp.arange(grad.shape[1])].add(kept)
    bags = _bags(indices, offsets)
    factor, _ = _per_index(bags, indices, mode, grad.shape[0], per_sample_weights, padding_idx, grad.dtype)
    if scale_grad_by_freq:
        factor = factor / jnp.zeros(num_weights, grad.dtype).at[indices].add(1)[indices]
    return table.at[indices].add(grad[bags] * factor[:, None])


@lowers(aten._embedding_bag_per_sample_weights_backward.default)
def _embedding_bag_per_sample_weights_backward(
    grad: jax.Array,
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    offset2bag: jax.Array,
    mode: int,
    padding_idx: int = -1,
) -> jax.Array:
    products = (grad[_bags(indices, offsets)] * weight[indices]).sum(-1)
    return jnp.where(indices == padding_idx, jnp.zeros_like(products), products) if padding_idx >= 0 else products
