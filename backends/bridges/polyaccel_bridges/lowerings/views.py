"""Shapes: views, expansions, slices and their scatters, concatenation and the like. Views are values here; capture removed writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import INT32, cast, result_dtype
from .table import lowers

aten = torch.ops.aten


def wrapped(dim: int, ndim: int) -> int:
    """A non-negative dim; a 0-d tensor has the one dim 0 (or -1), as in torch."""
    return dim + max(ndim, 1) if dim < 0 else dim


def wrapped_dims(dims: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Every dim for `None` and for an empty list, as reductions take them."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(ndim))
    listed = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(wrapped(dim, ndim) for dim in listed) if ndim else ()


@lowers(
    aten.view.default,
    aten.view_copy.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten._reshape_copy.default,
    aten._reshape_alias_copy.default,
)
def view(self: jax.Array, size: Sequence[int], stride: Sequence[int] | None = None) -> jax.Array:
    known = math.prod(length for length in size if length != -1)
    if -1 in size:  # jnp cannot infer a length for an empty array
        size = [self.size // known if length == -1 else length for length in size]
    return jnp.reshape(self, tuple(size))


@lowers(aten.permute.default, aten.permute_copy.default)
def permute(self: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(self, [wrapped(dim, self.ndim) for dim in dims])


@lowers(aten.transpose.int, aten.transpose_copy.int)
def transpose(self: jax.Array, dim0: int, dim1: int) -> jax.Array:
    return jnp.swapaxes(self, dim0, dim1) if self.ndim else self


@lowers(aten.t.default, aten.t_copy.default)
def t(self: jax.Array) -> jax.Array:
    return self.T


@lowers(aten.expand.default, aten.expand_copy.default)
def expand(self: jax.Array, size: Sequence[int], *, implicit: bool = False) -> jax.Array:
    lead = len(size) - self.ndim
    shape = [self.shape[i - lead] if length == -1 else length for i, length in enumerate(size)]
    return jnp.broadcast_to(self, shape)


@lowers(aten.squeeze.default, aten.squeeze_copy.default)
def squeeze(self: jax.Array) -> jax.Array:
    return self.reshape([length for length in self.shape if length != 1])


@lowers(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_copy.dim, aten.squeeze_copy.dims)
def squeeze_dims(self: jax.Array, dim: int | Sequence[int]) -> jax.Array:
    dims = [dim] if isinstance(dim, int) else dim
    removed = {wrapped(d, self.ndim) for d in dims}
    return self.reshape([length for i, length in enumerate(self.shape) if not (i in removed and length == 1)])


@lowers(aten.unsqueeze.default, aten.unsqueeze_copy.default)
def unsqueeze(self: jax.Array, dim: int) -> jax.Array:
    return jnp.expand_dims(self, dim + self.ndim + 1 if dim < 0 else dim)


@lowers(aten.select.int, aten.select_copy.int)
def select(self: jax.Array, dim: int, index: int) -> jax.Array:
    return lax.index_in_dim(self, index, wrapped(dim, self.ndim), keepdims=False)


def _bounds(length: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Torch clamps both ends into the dim; an end before the start gives an empty slice."""
    first = 0 if start is None else start
    last = length if end is None else end
    first, last = (min(max(i + length if i < 0 else i, 0), length) for i in (first, last))
    return first, max(first, last)


@lowers(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_dim(
    self: jax.Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> jax.Array:
    dim = wrapped(dim, self.ndim)
    first, last = _bounds(self.shape[dim], start, end)
    return lax.slice_in_dim(self, first, last, step, axis=dim)


@lowers(aten.narrow_copy.default)
def narrow(self: jax.Array, dim: int, start: int, length: int) -> jax.Array:
    dim = wrapped(dim, self.ndim)
    start = start + self.shape[dim] if start < 0 else start
    return lax.slice_in_dim(self, start, start + length, axis=dim)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    self: jax.Array, src: jax.Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> jax.Array:
    dim = wrapped(dim, self.ndim)
    first, last = _bounds(self.shape[dim], start, end)
    count = -(-(last - first) // step)
    src = jnp.broadcast_to(cast(src, self.dtype), (*self.shape[:dim], count, *self.shape[dim + 1 :]))
    if count == self.shape[dim]:
        return src
    if step == 1:  # a dynamic-update-slice, which XLA does in place
        return lax.dynamic_update_slice_in_dim(self, src, first, dim) if count else self
    return self.at[(slice(None),) * dim + (slice(first, last, step),)].set(src)


@lowers(aten.select_scatter.default)
def select_scatter(self: jax.Array, src: jax.Array, dim: int, index: int) -> jax.Array:
    dim = wrapped(dim, self.ndim)
    index = index + self.shape[dim] if index < 0 else index
    shape = (*self.shape[:dim], *self.shape[dim + 1 :])
    src = jnp.expand_dims(jnp.broadcast_to(cast(src, self.dtype), shape), dim)
    return lax.dynamic_update_slice_in_dim(self, src, index, dim)


def _diagonal_indices(shape: Sequence[int], offset: int, dim1: int, dim2: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = shape[dim1], shape[dim2]
    first_row, first_column = max(-offset, 0), max(offset, 0)
    count = max(0, min(rows - first_row, columns - first_column))
    steps = np.arange(count, dtype=INT32)
    return first_row + steps, first_column + steps


@lowers(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(self: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    dim1, dim2 = wrapped(dim1, self.ndim), wrapped(dim2, self.ndim)
    rows, columns = _diagonal_indices(self.shape, offset, dim1, dim2)
    return jnp.moveaxis(self, (dim1, dim2), (-2, -1))[..., rows, columns]


@lowers(aten.diagonal_scatter.default)
def diagonal_scatter(self: jax.Array, src: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    dim1, dim2 = wrapped(dim1, self.ndim), wrapped(dim2, self.ndim)
    rows, columns = _diagonal_indices(self.shape, offset, dim1, dim2)
    last = jnp.moveaxis(self, (dim1, dim2), (-2, -1)).at[..., rows, columns].set(cast(src, self.dtype))
    return jnp.moveaxis(last, (-2, -1), (dim1, dim2))


def _strided_indices(size: Sequence[int], stride: Sequence[int], offset: int) -> np.ndarray:
    indices = np.asarray(offset, np.int64)
    for length, step in zip(size, stride, strict=True):
        indices = indices[..., None] + np.arange(length, dtype=np.int64) * step
    return indices


def _needs_own_storage(self: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Elements are counted in the storage, so it must hold exactly the tensor's elements in order."""
    if self.is_contiguous() and self.storage_offset() == 0:
        return None
    return "it reads the storage of a tensor that is a view or not contiguous; call .contiguous() on that tensor first"


@lowers(aten.as_strided.default, aten.as_strided_copy.default, refuses=_needs_own_storage)
def as_strided(
    self: jax.Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> jax.Array:
    """Elements of the flattened array."""
    contiguous = [math.prod(size[i + 1 :]) for i in range(len(size))]
    if tuple(size) == self.shape and not storage_offset and list(stride) == contiguous:
        return self
    return self.reshape(-1)[_strided_indices(size, stride, storage_offset or 0)]


@lowers(aten.as_strided_scatter.default, refuses=_needs_own_storage)
def as_strided_scatter(
    self: jax.Array, src: jax.Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> jax.Array:
    indices = _strided_indices(size, stride, storage_offset or 0)
    return self.reshape(-1).at[indices].set(cast(src, self.dtype)).reshape(self.shape)


@lowers(aten.unfold.default, aten.unfold_copy.default)
def unfold(self: jax.Array, dimension: int, size: int, step: int) -> jax.Array:
    """Windows of `size` along a dim, the window's elements in a new last dim."""
    if self.ndim == 0:
        return jnp.broadcast_to(self, (size,))
    dim = wrapped(dimension, self.ndim)
    starts = np.arange(0, self.shape[dim] - size + 1, step, dtype=INT32)
    windows = jnp.take(self, starts[:, None] + np.arange(size, dtype=INT32), axis=dim)
    return jnp.moveaxis(windows, dim + 1, -1)


@lowers(aten.unfold_backward.default)
def unfold_backward(grad_in: jax.Array, input_sizes: Sequence[int], dim: int, size: int, step: int) -> jax.Array:
    empty = jnp.zeros(tuple(input_sizes), grad_in.dtype)
    return jax.linear_transpose(lambda x: unfold(x, dim, size, step), empty)(grad_in)[0]


# --- several tensors -----------------------------------------------------------------------------------------------------------


def _without_legacy_empties(tensors: Sequence[jax.Array]) -> list[jax.Array]:
    """Torch lets an empty 1-d tensor take part in any concatenation."""
    kept = [x for x in tensors if x.shape != (0,)]
    return kept or list(tensors[:1])


@lowers(aten.cat.default)
def cat(tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    dtype = result_dtype(*tensors)
    kept = _without_legacy_empties(tensors)
    return lax.concatenate([cast(x, dtype) for x in kept], wrapped(dim, kept[0].ndim))


@lowers(aten.stack.default)
def stack(tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    dtype = result_dtype(*tensors)
    return jnp.stack([cast(x, dtype) for x in tensors], axis=dim)


@lowers(aten.split_with_sizes.default, aten.split_with_sizes_copy.default)
def split_with_sizes(self: jax.Array, split_sizes: Sequence[int], dim: int = 0) -> list[jax.Array]:
    dim = wrapped(dim, self.ndim)
    ends = np.cumsum(split_sizes).tolist()
    return [lax.slice_in_dim(self, end - size, end, axis=dim) for size, end in zip(split_sizes, ends, strict=True)]


@lowers(aten.split.Tensor, aten.split_copy.Tensor)
def split(self: jax.Array, split_size: int, dim: int = 0) -> list[jax.Array]:
    length = self.shape[wrapped(dim, self.ndim)]
    if length == 0 or split_size == 0:
        return [self]
    full, rest = divmod(length, split_size)
    return split_with_sizes(self, [split_size] * full + [rest] * bool(rest), dim)


@lowers(aten.unbind.int, aten.unbind_copy.int)
def unbind(self: jax.Array, dim: int = 0) -> list[jax.Array]:
    return [select(self, dim, i) for i in range(self.shape[wrapped(dim, self.ndim)])]


# --- rearranging ---------------------------------------------------------------------------------------------------------------


@lowers(aten.flip.default)
def flip(self: jax.Array, dims: Sequence[int]) -> jax.Array:
    return lax.rev(self, [wrapped(dim, self.ndim) for dim in dims]) if self.ndim and dims else self


@lowers(aten.roll.default)
def roll(self: jax.Array, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> jax.Array:
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    shifts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    if not dims:
        return jnp.roll(self.reshape(-1), shifts[0]).reshape(self.shape)
    return jnp.roll(self, shifts, dims)


@lowers(aten.repeat.default)
def repeat(self: jax.Array, repeats: Sequence[int]) -> jax.Array:
    return jnp.tile(self.reshape((1,) * (len(repeats) - self.ndim) + self.shape), tuple(repeats))


def _triangle(shape: Sequence[int], diagonal: int) -> jax.Array:
    """True where column - row <= diagonal, made of two iotas that fuse into their reader."""
    rows, columns = shape[-2:]
    row = lax.broadcasted_iota(INT32, (rows, columns), 0)
    return lax.broadcasted_iota(INT32, (rows, columns), 1) - row <= diagonal


@lowers(aten.tril.default)
def tril(self: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.where(_triangle(self.shape, diagonal), self, jnp.zeros_like(self))


@lowers(aten.triu.default)
def triu(self: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.where(_triangle(self.shape, diagonal - 1), jnp.zeros_like(self), self)


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(self: jax.Array, upscale_factor: int) -> jax.Array:
    r = upscale_factor
    *lead, c, h, w = self.shape
    blocks = jnp.moveaxis(self.reshape(*lead, c // r**2, r, r, h, w), (-4, -3), (-3, -1))
    return blocks.reshape(*lead, c // r**2, h * r, w * r)


@lowers(aten.pixel_unshuffle.default)
def pixel_unshuffle(self: jax.Array, downscale_factor: int) -> jax.Array:
    r = downscale_factor
    *lead, c, h, w = self.shape
    blocks = jnp.moveaxis(self.reshape(*lead, c, h // r, r, w // r, r), (-3, -1), (-4, -3))
    return blocks.reshape(*lead, c * r**2, h // r, w // r)


@lowers(aten.channel_shuffle.default)
def channel_shuffle(self: jax.Array, groups: int) -> jax.Array:
    n, c, *rest = self.shape
    return jnp.swapaxes(self.reshape(n, groups, c // groups, *rest), 1, 2).reshape(self.shape)
