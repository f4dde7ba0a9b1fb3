"""Sorting, selection and search. NaN counts as the largest value, equal elements keep their order, indices are int64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import BOOL, INT32, INT64, UINT8, cast, is_float, result_dtype
from .reductions import argmax
from .table import lowers
from .views import wrapped

aten = torch.ops.aten
Pair = tuple[jax.Array, jax.Array]


@lowers(aten.sort.default)
def sort(self: jax.Array, dim: int = -1, descending: bool = False) -> Pair:
    """Always stable, which torch's unstable sort allows."""
    if self.ndim == 0:
        return self, jnp.zeros((), INT64)
    axis = wrapped(dim, self.ndim)
    keys = self.astype(UINT8) if self.dtype == BOOL else self
    order = lax.broadcasted_iota(INT32 if self.shape[axis] < 2**31 else INT64, self.shape, axis)
    if descending:  # reversing before and after keeps equal elements in order
        keys, order = lax.rev(keys, [axis]), lax.rev(order, [axis])
    if is_float(keys.dtype):
        # -nan would sort first; torch has one NaN, larger than everything
        keys = jnp.where(jnp.isnan(keys), jnp.asarray(jnp.nan, keys.dtype), keys)
    values, order = lax.sort((keys, order), dimension=axis, is_stable=True, num_keys=1)
    if descending:
        values, order = lax.rev(values, [axis]), lax.rev(order, [axis])
    return values.astype(self.dtype), order.astype(INT64)


@lowers(aten.sort.stable)
def sort_stable(self: jax.Array, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Pair:
    return sort(self, dim, descending)


@lowers(aten.topk.default)
def topk(self: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Pair:
    if self.ndim == 0:
        return self, jnp.zeros((), INT64)
    axis = wrapped(dim, self.ndim)
    if largest and self.dtype.itemsize <= 4 and self.dtype != BOOL and not is_float(self.dtype):
        return _top_k(self, k, axis)
    if largest and is_float(self.dtype):
        return _top_k(self, k, axis)
    values, order = sort(self, axis, largest)
    return lax.slice_in_dim(values, 0, k, axis=axis), lax.slice_in_dim(order, 0, k, axis=axis)


def _top_k(x: jax.Array, k: int, axis: int) -> Pair:
    """XLA's own selection, which works on the last dim; like torch it takes NaN for the largest."""
    values, order = lax.top_k(jnp.moveaxis(x, axis, -1), k)
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(order, -1, axis).astype(INT64)


@lowers(aten.kthvalue.default)
def kthvalue(self: jax.Array, k: int, dim: int = -1, keepdim: bool = False) -> Pair:
    return _at_rank(*sort(self, dim), k - 1, dim, keepdim)


def _at_rank(values: jax.Array, order: jax.Array, rank: int, dim: int, keepdim: bool) -> Pair:
    if values.ndim == 0:
        return values, order
    axis = wrapped(dim, values.ndim)
    return (
        lax.index_in_dim(values, rank, axis, keepdims=keepdim),
        lax.index_in_dim(order, rank, axis, keepdims=keepdim),
    )


@lowers(aten.median.dim)
def median_dim(self: jax.Array, dim: int, keepdim: bool = False) -> Pair:
    """The lower of the two middle elements; the first NaN where there is one."""
    length = self.shape[wrapped(dim, self.ndim)] if self.ndim else 1
    values, order = _at_rank(*sort(self, dim), (length - 1) // 2, dim, keepdim)
    if not is_float(self.dtype) or self.ndim == 0:
        return values, order
    missing = jnp.any(jnp.isnan(self), axis=wrapped(dim, self.ndim), keepdims=keepdim)
    return (
        jnp.where(missing, jnp.asarray(jnp.nan, self.dtype), values),
        jnp.where(missing, argmax(jnp.isnan(self), dim, keepdim), order),
    )


@lowers(aten.median.default)
def median(self: jax.Array) -> jax.Array:
    return median_dim(self.reshape(-1), 0)[0]


@lowers(aten.nanmedian.dim)
def nanmedian_dim(self: jax.Array, dim: int, keepdim: bool = False) -> Pair:
    if not is_float(self.dtype) or self.ndim == 0:
        return median_dim(self, dim, keepdim)
    axis = wrapped(dim, self.ndim)
    values, order = sort(self, axis)
    count = jnp.sum(~jnp.isnan(self), axis=axis, keepdims=True, dtype=INT64)
    rank = jnp.maximum(count - 1, 0) // 2
    found = jnp.take_along_axis(values, rank, axis), jnp.take_along_axis(order, rank, axis)
    return found if keepdim else (jnp.squeeze(found[0], axis), jnp.squeeze(found[1], axis))


@lowers(aten.nanmedian.default)
def nanmedian(self: jax.Array) -> jax.Array:
    return nanmedian_dim(self.reshape(-1), 0)[0]


@lowers(aten.mode.default)
def mode(self: jax.Array, dim: int = -1, keepdim: bool = False) -> Pair:
    """The most frequent value, the smallest of several; with the index of its last occurrence."""
    if self.ndim == 0:
        return self, jnp.zeros((), INT64)
    axis = wrapped(dim, self.ndim)
    lines = jnp.moveaxis(self, axis, -1)
    values = sort(lines, -1)[0]
    alike = jnp.sum(values[..., :, None] == values[..., None, :], axis=-1, dtype=INT32)
    chosen = jnp.take_along_axis(values, jnp.argmax(alike, axis=-1, keepdims=True), -1)
    matches = lines == chosen
    last = self.shape[axis] - 1 - jnp.argmax(jnp.flip(matches, -1), axis=-1, keepdims=True)
    last = last.astype(INT64)
    if not keepdim:
        return chosen[..., 0], last[..., 0]
    return jnp.moveaxis(chosen, -1, axis), jnp.moveaxis(last, -1, axis)


# --- search --------------------------------------------------------------------------------------------------------------------


def _search(boundaries: jax.Array, values: jax.Array, side: str, out_int32: bool) -> jax.Array:
    """Both of shape (..., n) with the same leading dims."""

    def one(line: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.searchsorted(line, wanted, side=side)

    lead = boundaries.shape[:-1]
    search = one
    for _ in lead:
        search = jax.vmap(search)
    return search(boundaries, values).astype(INT32 if out_int32 else INT64)


@lowers(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(
    sorted_sequence: jax.Array,
    self: jax.Array | float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: jax.Array | None = None,
) -> jax.Array:
    if sorter is not None:
        sorted_sequence = jnp.take_along_axis(sorted_sequence, sorter, axis=-1)
    side = "right" if right or side == "right" else "left"
    dtype = result_dtype(sorted_sequence, self)
    boundaries, values = cast(sorted_sequence, dtype), jnp.asarray(cast(self, dtype))
    if boundaries.ndim <= 1:
        return _search(boundaries.reshape(-1), values, side, out_int32)
    return _search(boundaries, values, side, out_int32)


@lowers(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(
    self: jax.Array | float, boundaries: jax.Array, *, out_int32: bool = False, right: bool = False
) -> jax.Array:
    return searchsorted(boundaries, self, out_int32=out_int32, right=right)


@lowers(aten.histc.default)
def histc(self: jax.Array, bins: int = 100, min: float = 0, max: float = 0) -> jax.Array:
    """Counts in equal bins of [min, max], the last one closed; equal limits mean the data's own."""
    x = self.reshape(-1)
    low, high = (jnp.asarray(min, x.dtype), jnp.asarray(max, x.dtype)) if min != max else (jnp.min(x), jnp.max(x))
    flat = low == high
    low, high = jnp.where(flat, low - 1, low), jnp.where(flat, high + 1, high)
    bucket = jnp.minimum(((x - low) / (high - low) * bins).astype(INT32), bins - 1)
    inside = (x >= low) & (x <= high)
    return jnp.zeros(bins, x.dtype).at[jnp.where(inside, bucket, bins)].add(jnp.asarray(1, x.dtype), mode="drop")
