"""Pooling of one to three spatial dims. A window is walked offset by offset: every step is a slice that XLA fuses with the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .matmul import precision_of
from .table import lowers

aten = torch.ops.aten

# Longer windows are gathered and reduced: one step per element would be slow to compile.
_MAX_UNROLLED = 16


def _expand(values: Sequence[int] | int, count: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * count if len(values) == 1 else values


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows along one dim of `size` elements: output `i` covers `starts[i] + j * dilation` for j < lengths[i]."""

    size: int
    starts: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    dilation: int
    stride: int  # 0: irregular

    @property
    def count(self) -> int:
        return len(self.starts)

    @property
    def tiles(self) -> bool:
        """Whether the windows cover the dim without gap, overlap or padding."""
        regular = self.stride == self.reach and self.dilation == 1 and bool((self.lengths == self.reach).all())
        return regular and self.starts[0] == 0 and self.count * self.reach == self.size

    @property
    def reach(self) -> int:
        return int(self.lengths.max())

    def positions(self, offset: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.starts + offset * self.dilation

    def valid(self, offset: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        positions = self.positions(offset)
        return (offset < self.lengths) & (positions >= 0) & (positions < self.size)


def _sliding(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> _Windows:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if (
        ceil_mode and (count - 1) * stride >= size + padding
    ):  # the last window must start inside the input or left padding
        count -= 1
    starts = np.arange(count, dtype=np.int64) * stride - padding
    return _Windows(size, starts, np.full(count, kernel, np.int64), dilation, stride)


def _adaptive(size: int, count: int) -> _Windows:
    index = np.arange(count, dtype=np.int64)
    starts, ends = index * size // count, -(-(index + 1) * size // count)
    return _Windows(size, starts, ends - starts, 1, size // count if count and size % count == 0 else 0)


def _take(x: jax.Array, dim: int, windows: _Windows, offset: int, fill: Any) -> jax.Array:
    """The element at `offset` of every window along `dim`; `fill` outside."""
    valid = windows.valid(offset)
    if windows.stride:
        low = int(windows.positions(offset)[0])
        high = int(windows.positions(offset)[-1])
        padding = [(0, 0, 0)] * x.ndim
        padding[dim] = (max(-low, 0), max(high - windows.size + 1, 0), 0)
        if padding[dim] != (0, 0, 0):
            x = lax.pad(x, jnp.asarray(fill, x.dtype), padding)
        begin = low + padding[dim][0]
        return lax.slice_in_dim(x, begin, begin + high - low + 1, windows.stride, dim)
    rows = np.clip(windows.positions(offset), 0, windows.size - 1)
    taken = jnp.take(x, rows, dim)
    shape = [1] * x.ndim
    shape[dim] = len(rows)
    return taken if valid.all() else jnp.where(valid.reshape(shape), taken, jnp.asarray(fill, x.dtype))


def _offsets(windows: Sequence[_Windows]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(w.reach) for w in windows))


def _flat_positions(windows: Sequence[_Windows], offsets: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The input position, counted over all spatial dims, of the element at `offsets` of every window."""
    flat = np.zeros((1,) * len(windows), np.int64)
    for dim, (w, offset) in enumerate(zip(windows, offsets, strict=True)):
        shape = [1] * len(windows)
        shape[dim] = -1
        flat = flat * w.size + w.positions(offset).reshape(shape)
    return flat


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, np.floating) else np.iinfo(dtype).min


def _along(values: np.ndarray[Any, Any], ndim: int, dim: int) -> np.ndarray[Any, Any]:
    """A static vector (or matrix, over `dim` and the next one) that broadcasts against `ndim` dims."""
    shape = [1] * ndim
    shape[dim : dim + values.ndim] = values.shape
    return values.reshape(shape)


def _gathered(x: jax.Array, dim: int, windows: _Windows, fill: Any) -> jax.Array:
    """Every window as a dim of its own, after `dim`."""
    shape = (*x.shape[:dim], windows.count, windows.reach, *x.shape[dim + 1 :])
    if windows.tiles:
        return x.reshape(shape)
    rows = np.stack([windows.positions(offset) for offset in range(windows.reach)], 1)
    valid = np.stack([windows.valid(offset) for offset in range(windows.reach)], 1)
    taken = jnp.take(x, np.clip(rows, 0, windows.size - 1).reshape(-1), dim).reshape(shape)
    return jnp.where(_along(valid, len(shape), dim), taken, jnp.asarray(fill, x.dtype))


def _max_pool(x: jax.Array, windows: Sequence[_Windows]) -> tuple[jax.Array, jax.Array]:
    """The largest element of every window and its position, counted over all spatial dims; the first of equal ones.

    One dim after the other, from the last: the first of equal elements in row-major order is the first row's first.
    """
    lead = x.ndim - len(windows)
    where = jnp.zeros(x.shape, np.int32)
    scale = 1
    for dim, w in reversed(list(enumerate(windows, start=lead))):
        x, where = _max_along(x, where, dim, w, scale)
        scale *= w.size
    return x, where.astype(np.int64)


def _max_along(x: jax.Array, where: jax.Array, dim: int, w: _Windows, scale: int) -> tuple[jax.Array, jax.Array]:
    lowest = _lowest(x.dtype)
    if w.reach > _MAX_UNROLLED:
        values = _gathered(x, dim, w, lowest)
        rows = np.stack([w.positions(offset) for offset in range(w.reach)], 1).clip(0, w.size - 1) * scale
        inner = _gathered(where, dim, w, 0) + jnp.asarray(_along(rows, values.ndim, dim), np.int32)
        chosen = jnp.argmax(values, dim + 1, keepdims=True)
        return tuple(jnp.take_along_axis(a, chosen, dim + 1).squeeze(dim + 1) for a in (values, inner))  # type: ignore[return-value]
    shape = (*x.shape[:dim], w.count, *x.shape[dim + 1 :])
    best, place = jnp.full(shape, lowest, x.dtype), jnp.zeros(shape, np.int32)
    seen = np.zeros(w.count, np.bool_)
    for offset in range(w.reach):
        values = _take(x, dim, w, offset, lowest)
        first = w.valid(offset) & ~seen  # so that a window of nothing but -inf has a place
        seen |= first
        wins = (values > best) | _along(first, x.ndim, dim)
        if jnp.issubdtype(x.dtype, np.floating):
            wins = wins | jnp.isnan(values)  # NaN wins, as in torch
        position = _along(w.positions(offset) * scale, x.ndim, dim)
        place = jnp.where(wins, _take(where, dim, w, offset, 0) + jnp.asarray(position, np.int32), place)
        best = jnp.where(wins, values, best)
    return best, place


def _max_pool_backward(grad: jax.Array, x: jax.Array, windows: Sequence[_Windows], indices: jax.Array) -> jax.Array:
    lead = x.ndim - len(windows)
    indices = indices.astype(np.int32)
    # Sums of shifted products fuse into one loop; a scatter does not, and pays off for large windows only.
    if all(w.stride for w in windows) and math.prod(w.reach for w in windows) <= 4 * _MAX_UNROLLED:
        total = jnp.zeros(x.shape, grad.dtype)
        for offsets in _offsets(windows):
            chosen = indices == jnp.asarray(_flat_positions(windows, offsets), np.int32)
            part = jnp.where(chosen, grad, jnp.zeros_like(grad))
            total = total + _spread(part, lead, windows, offsets)
        return total
    return _scatter_to_positions(grad, x.shape, len(windows), indices)


def _scatter_to_positions(grad: jax.Array, shape: Sequence[int], count: int, indices: jax.Array) -> jax.Array:
    """Zeros of `shape`, with every gradient added at its position among the last `count` dims."""
    lead, size = int(np.prod(shape[:-count])), int(np.prod(shape[-count:]))
    rows = jnp.arange(lead, dtype=np.int32)[:, None]
    out = jnp.zeros((lead, size), grad.dtype).at[rows, indices.reshape(lead, -1)].add(grad.reshape(lead, -1))
    return out.reshape(tuple(shape))


def _spread(part: jax.Array, lead: int, windows: Sequence[_Windows], offsets: Sequence[int]) -> jax.Array:
    """Back to the input's shape: the transpose of taking one offset of every (regular) window."""
    config = [(0, 0, 0)] * lead
    for w, offset in zip(windows, offsets, strict=True):
        low = int(w.positions(offset)[0])
        high = int(w.positions(offset)[-1])
        config.append((low, w.size - 1 - high, w.stride - 1))
    return lax.pad(part, jnp.zeros((), part.dtype), config)


def _avg_pool(x: jax.Array, windows: Sequence[_Windows], divisor: Any) -> jax.Array:
    lead = x.ndim - len(windows)
    wide = jnp.promote_types(x.dtype, np.float32) if jnp.issubdtype(x.dtype, np.inexact) else x.dtype
    total = x.astype(wide)
    for dim, w in enumerate(windows, start=lead):  # a sum over a box is a sum over each dim in turn
        if w.tiles:
            total = total.reshape(*total.shape[:dim], w.count, w.reach, *total.shape[dim + 1 :]).sum(dim + 1)
        elif w.reach > _MAX_UNROLLED:
            member = np.zeros((w.count, w.size))
            for offset in range(w.reach):
                inside = w.valid(offset)
                member[np.flatnonzero(inside), w.positions(offset)[inside]] = 1
            matrix = jnp.asarray(member, wide)
            total = jnp.moveaxis(jnp.tensordot(total, matrix, (dim, 1), precision=precision_of(matrix)), -1, dim)
        else:
            total = sum((_take(total, dim, w, offset, 0) for offset in range(w.reach)), start=jnp.zeros((), wide))
    return (total / jnp.asarray(divisor, wide)).astype(x.dtype)


def _sliding_windows(
    x: jax.Array,
    count: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | int,
    dilation: Sequence[int] | int,
    ceil_mode: bool,
) -> list[_Windows]:
    kernel = _expand(kernel_size, count)
    steps = _expand(stride, count) if len(stride) else kernel
    config = zip(x.shape[-count:], kernel, steps, _expand(padding, count), _expand(dilation, count), strict=True)
    return [_sliding(*sizes, ceil_mode) for sizes in config]


def _register_sliding_max(count: int, forward: Any, backward: Any) -> None:
    @lowers(forward)
    def max_pool(
        self: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        ceil_mode: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        return _max_pool(self, _sliding_windows(self, count, kernel_size, stride, padding, dilation, ceil_mode))

    @lowers(backward)
    def max_pool_backward(
        grad_output: jax.Array,
        self: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | int,
        dilation: Sequence[int] | int,
        ceil_mode: bool,
        indices: jax.Array,
    ) -> jax.Array:
        windows = _sliding_windows(self, count, kernel_size, stride, padding, dilation, ceil_mode)
        return _max_pool_backward(grad_output, self, windows, indices)


def _register_adaptive_max(count: int, forward: Any, backward: Any) -> None:
    def windows_of(x: jax.Array, output_size: Sequence[int]) -> list[_Windows]:
        return [_adaptive(size, out) for size, out in zip(x.shape[-count:], output_size, strict=True)]

    @lowers(forward)
    def adaptive_max_pool(self: jax.Array, output_size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        return _max_pool(self, windows_of(self, output_size))

    @lowers(backward)
    def adaptive_max_pool_backward(grad_output: jax.Array, self: jax.Array, indices: jax.Array) -> jax.Array:
        return _max_pool_backward(grad_output, self, windows_of(self, indices.shape[-count:]), indices)


def _register_adaptive_avg(count: int, forward: Any, backward: Any) -> None:
    def pool(x: jax.Array, output_size: Sequence[int]) -> jax.Array:
        windows = [_adaptive(size, out) for size, out in zip(x.shape[-count:], output_size, strict=True)]
        divisor = np.ones((1,) * count)
        for dim, w in enumerate(windows):
            divisor = divisor * w.lengths.reshape([-1 if d == dim else 1 for d in range(count)])
        return _avg_pool(x, windows, divisor)

    @lowers(forward)
    def adaptive_avg_pool(self: jax.Array, output_size: Sequence[int]) -> jax.Array:
        return pool(self, output_size)

    @lowers(backward)
    def adaptive_avg_pool_backward(grad_output: jax.Array, self: jax.Array) -> jax.Array:
        output_size = grad_output.shape[-count:]
        grad: jax.Array
        (grad,) = jax.linear_transpose(lambda x: pool(x, output_size), self)(grad_output)
        return grad


def _register_sliding_avg(count: int, forward: Any, backward: Any) -> None:
    def pool(
        x: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | int,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> jax.Array:
        windows = _sliding_windows(x, count, kernel_size, stride, padding, 1, ceil_mode)
        if divisor_override is not None:
            return _avg_pool(x, windows, divisor_override)
        divisor = np.ones((1,) * count)
        for dim, (w, pad) in enumerate(zip(windows, _expand(padding, count), strict=True)):
            low, high = (-pad, w.size + pad) if count_include_pad else (0, w.size)
            inside = np.minimum(w.starts + w.lengths, high) - np.maximum(w.starts, low)
            divisor = divisor * inside.reshape([-1 if d == dim else 1 for d in range(count)])
        return _avg_pool(x, windows, divisor)

    @lowers(forward)
    def avg_pool(
        self: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] | int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> jax.Array:
        return pool(self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    @lowers(backward)
    def avg_pool_backward(
        grad_output: jax.Array,
        self: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | int,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> jax.Array:
        config = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        grad: jax.Array
        (grad,) = jax.linear_transpose(lambda x: pool(x, *config), self)(grad_output)
        return grad


_register_sliding_max(2, aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default)
_register_sliding_max(3, aten.max_pool3d_with_indices.default, aten.max_pool3d_with_indices_backward.default)
_register_adaptive_max(2, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default)
_register_adaptive_max(3, aten.adaptive_max_pool3d.default, aten.adaptive_max_pool3d_backward.default)
_register_adaptive_avg(2, aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default)
_register_adaptive_avg(3, aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default)
_register_sliding_avg(2, aten.avg_pool2d.default, aten.avg_pool2d_backward.default)
_register_sliding_avg(3, aten.avg_pool3d.default, aten.avg_pool3d_backward.default)


def _fractional_starts(samples: jax.Array, size: int, count: int, kernel: int) -> jax.Array:
    """(n, c) draws in [0, 1) -> (n, c, count) first elements of pseudo-random windows (https://arxiv.org/abs/1412.6071)."""
    last = jnp.full((*samples.shape, 1), size - kernel, np.int32)
    if count == 1:
        return last
    alpha = jnp.asarray((size - kernel) / (count - 1), samples.dtype)
    index = jnp.arange(count - 1, dtype=samples.dtype)
    base = (samples * alpha).astype(np.int32)[..., None]
    return jnp.concatenate([((index + samples[..., None]) * alpha).astype(np.int32) - base, last], -1)


def _register_fractional_max(count: int, forward: Any, backward: Any) -> None:
    @lowers(forward)
    def fractional_max_pool(
        self: jax.Array, kernel_size: Sequence[int], output_size: Sequence[int], random_samples: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kernel, sizes = _expand(kernel_size, count), self.shape[-count:]
        if self.size == 0:
            empty = (*self.shape[:-count], *output_size)
            return jnp.zeros(empty, self.dtype), jnp.zeros(empty, np.int64)
        x = self.reshape(-1, *sizes)  # (n * c, *sizes)
        samples = jnp.broadcast_to(random_samples, (*random_samples.shape[:2], count)).reshape(-1, count)
        flat = jnp.zeros((x.shape[0], *[1] * (2 * count)), np.int32)
        for dim, (size, out, width) in enumerate(zip(sizes, output_size, kernel, strict=True)):
            # torch draws for the last dim first in two dims, and for the first dim first in three.
            draws = samples[:, count - 1 - dim] if count == 2 else samples[:, dim]
            positions = _fractional_starts(draws, size, out, width)[..., None] + jnp.arange(width, dtype=np.int32)
            shape = [1] * (2 * count)
            shape[dim], shape[count + dim] = out, width
            flat = flat * size + positions.reshape(-1, *shape)
        flat = flat.reshape(x.shape[0], *output_size, -1)  # the windows' elements come last
        values = jnp.take_along_axis(x.reshape(x.shape[0], -1), flat.reshape(x.shape[0], -1), 1).reshape(flat.shape)
        best = jnp.argmax(values, -1)[..., None]
        shape_out = (*self.shape[:-count], *output_size)
        taken = jnp.take_along_axis(values, best, -1).reshape(shape_out)
        return taken, jnp.take_along_axis(flat, best, -1).reshape(shape_out).astype(np.int64)

    @lowers(backward)
    def fractional_max_pool_backward(
        grad_output: jax.Array,
        self: jax.Array,
        kernel_size: Sequence[int],
        output_size: Sequence[int],
        indices: jax.Array,
    ) -> jax.Array:
        if self.size == 0:
            return jnp.zeros(self.shape, grad_output.dtype)
        return _scatter_to_positions(grad_output, self.shape, count, indices.astype(np.int32))


_register_fractional_max(2, aten.fractional_max_pool2d.default, aten.fractional_max_pool2d_backward.default)
_register_fractional_max(3, aten.fractional_max_pool3d.default, aten.fractional_max_pool3d_backward.default)
