"""Cumulative operations along one dim, in torch's accumulation dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import INT64, DType, cast, is_complex, is_float, is_integral, opmath
from .table import lowers
from .views import wrapped

aten = torch.ops.aten


def _cumulative(function: Callable[..., Any], x: jax.Array, dim: int, dtype: DType | None) -> jax.Array:
    dtype = dtype or (INT64 if is_integral(x.dtype) else np.dtype(x.dtype))
    values = cast(cast(x, dtype), opmath(dtype))
    if x.ndim:
        values = function(values, axis=wrapped(dim, x.ndim))
    result: jax.Array = cast(values, dtype)
    return result


@lowers(aten.cumsum.default)
def cumsum(self: jax.Array, dim: int, *, dtype: DType | None = None) -> jax.Array:
    return _cumulative(lax.cumsum, self, dim, dtype)


@lowers(aten.cumprod.default)
def cumprod(self: jax.Array, dim: int, *, dtype: DType | None = None) -> jax.Array:
    return _cumulative(lax.cumprod, self, dim, dtype)


@lowers(aten.logcumsumexp.default)
def logcumsumexp(self: jax.Array, dim: int) -> jax.Array:
    return _cumulative(_log_cumulative, self, dim, np.dtype(self.dtype))


def _log_cumulative(x: jax.Array, axis: int) -> jax.Array:
    return lax.associative_scan(_logaddexp, x, axis=axis)


def _logaddexp(a: jax.Array, b: jax.Array) -> jax.Array:
    if is_complex(a.dtype):
        larger = jnp.where(jnp.real(a) >= jnp.real(b), a, b)
        smaller = jnp.where(jnp.real(a) >= jnp.real(b), b, a)
        return larger + jnp.log1p(jnp.exp(smaller - larger))
    return jnp.logaddexp(a, b)


def _cumulative_extreme(x: jax.Array, dim: int, is_max: bool) -> tuple[jax.Array, jax.Array]:
    """Values and the index of the last element that equals the extreme so far; a NaN stays from where it first stood."""
    if x.ndim == 0:
        return x, jnp.zeros((), INT64)
    axis = wrapped(dim, x.ndim)
    if x.shape[axis] == 0:
        return x, jnp.zeros(x.shape, INT64)
    index = lax.broadcasted_iota(INT64, x.shape, axis)

    def later(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (a, i), (b, j) = left, right
        takes = b >= a if is_max else b <= a
        if is_float(x.dtype):
            takes = jnp.isnan(b) | (takes & ~jnp.isnan(a))
        return jnp.where(takes, b, a), jnp.where(takes, j, i)

    values, indices = lax.associative_scan(later, (x, index), axis=axis)
    return values, indices


@lowers(aten.cummax.default)
def cummax(self: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    return _cumulative_extreme(self, dim, True)


@lowers(aten.cummin.default)
def cummin(self: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    return _cumulative_extreme(self, dim, False)
