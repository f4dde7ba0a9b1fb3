"""Arrays from nothing but sizes and numbers. `empty` is zeros: the same program must give the same values every time."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .promotion import (
    INT64,
    DType,
    Number,
    cast,
    complex_dtype,
    default_dtype,
    dtype_of,
    is_complex,
    is_float,
)
from .table import lowers

aten = torch.ops.aten


def _filled(size: Sequence[int], value: Number | jax.Array, dtype: DType) -> jax.Array:
    return jnp.broadcast_to(cast(value, dtype), tuple(size))


@lowers(aten.full.default)
def full(size: Sequence[int], fill_value: Number, *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, fill_value, dtype or dtype_of(fill_value))


@lowers(aten.full_like.default)
def full_like(self: jax.Array, fill_value: Number, *, dtype: DType | None = None) -> jax.Array:
    return _filled(self.shape, fill_value, dtype or self.dtype)


@lowers(aten.new_full.default)
def new_full(self: jax.Array, size: Sequence[int], fill_value: Number, *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, fill_value, dtype or self.dtype)


@lowers(aten.fill.Scalar, aten.fill.Tensor)
def fill(self: jax.Array, value: Number | jax.Array) -> jax.Array:
    return _filled(self.shape, value, self.dtype)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(s: Number, *, dtype: DType | None = None) -> jax.Array:
    # without a dtype torch takes the default one, also for integers
    return _filled((), s, dtype or (complex_dtype(default_dtype()) if isinstance(s, complex) else default_dtype()))


@lowers(aten.zeros.default, aten.empty.memory_format)
def zeros(size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 0, dtype or default_dtype())


@lowers(aten.ones.default)
def ones(size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 1, dtype or default_dtype())


@lowers(aten.empty_permuted.default)
def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 0, dtype or default_dtype())


@lowers(aten.empty_strided.default)
def empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 0, dtype or default_dtype())


@lowers(aten.zeros_like.default, aten.empty_like.default)
def zeros_like(self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return _filled(self.shape, 0, dtype or self.dtype)


@lowers(aten.ones_like.default)
def ones_like(self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return _filled(self.shape, 1, dtype or self.dtype)


@lowers(aten.new_zeros.default, aten.new_empty.default)
def new_zeros(self: jax.Array, size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 0, dtype or self.dtype)


@lowers(aten.new_ones.default)
def new_ones(self: jax.Array, size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 1, dtype or self.dtype)


@lowers(aten.new_empty_strided.default)
def new_empty_strided(
    self: jax.Array, size: Sequence[int], stride: Sequence[int], *, dtype: DType | None = None
) -> jax.Array:
    return _filled(size, 0, dtype or self.dtype)


@lowers(aten._efficientzerotensor.default)
def efficient_zeros(size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _filled(size, 0, dtype or default_dtype())


def _range_dtype(dtype: DType | None, *numbers: Number) -> DType:
    return dtype or (default_dtype() if any(isinstance(number, float) for number in numbers) else INT64)


@lowers(aten.arange.start_step)
def arange(start: float, end: float, step: float = 1, *, dtype: DType | None = None) -> jax.Array:
    """`start + i * step`, computed in int64 or float64 and rounded once, as torch does."""
    dtype = _range_dtype(dtype, start, end, step)
    if not is_float(dtype):
        start, end, step = int(start), int(end), int(step)
        count = max(0, -((start - end) // step))
        return jnp.arange(count, dtype=INT64).astype(dtype) * cast(step, dtype) + cast(start, dtype)
    count = max(0, int(np.ceil((end - start) / step)))
    return jnp.asarray((start + np.arange(count, dtype=np.float64) * step).astype(dtype))


@lowers(aten.arange.start)
def arange_start(start: float, end: float, *, dtype: DType | None = None) -> jax.Array:
    return arange(start, end, 1, dtype=dtype)


@lowers(aten.arange.default)
def arange_end(end: float, *, dtype: DType | None = None) -> jax.Array:
    return arange(0, end, 1, dtype=dtype)


@lowers(aten.linspace.default)
def linspace(start: Number, end: Number, steps: int, *, dtype: DType | None = None) -> jax.Array:
    """Counted from both ends, so that the last element is exactly `end`."""
    if dtype is None:
        dtype = default_dtype()
        dtype = complex_dtype(dtype) if isinstance(start, complex) or isinstance(end, complex) else dtype
    index = np.arange(steps, dtype=np.float64)
    gap = (end - start) / max(steps - 1, 1)
    values = np.where(index < steps // 2, start + index * gap, end - (steps - 1 - index) * gap) if steps > 1 else start
    values = np.broadcast_to(np.asarray(values), (steps,))
    if not is_float(dtype) and not is_complex(dtype):
        values = np.trunc(values)
    return jnp.asarray(values.astype(dtype))


@lowers(aten.eye.default)
def eye(n: int, *, dtype: DType | None = None) -> jax.Array:
    return jnp.eye(n, dtype=dtype or default_dtype())


@lowers(aten.eye.m)
def eye_m(n: int, m: int, *, dtype: DType | None = None) -> jax.Array:
    return jnp.eye(n, m, dtype=dtype or default_dtype())


def _triangle_indices(inside: np.ndarray, dtype: DType | None) -> jax.Array:
    return jnp.asarray(np.stack(np.nonzero(inside)).astype(dtype or INT64))


@lowers(aten.tril_indices.default)
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: DType | None = None) -> jax.Array:
    return _triangle_indices(np.tri(row, col, offset, dtype=bool), dtype)


@lowers(aten.triu_indices.default)
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: DType | None = None) -> jax.Array:
    return _triangle_indices(~np.tri(row, col, offset - 1, dtype=bool), dtype)
