"""Reductions over dims: sums and means accumulate float16 and bfloat16 in float32 and round once; integer sums are int64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import (
    BOOL,
    INT64,
    UINT8,
    DType,
    Number,
    cast,
    default_dtype,
    is_complex,
    is_integral,
    opmath,
    real_dtype,
)
from .table import lowers
from .views import wrapped, wrapped_dims

aten = torch.ops.aten
Dims = int | Sequence[int] | None


def _sum_dtype(x: jax.Array, dtype: DType | None) -> DType:
    return dtype or (INT64 if is_integral(x.dtype) else np.dtype(x.dtype))


@lowers(aten.sum.dim_IntList, aten.sum.default)
def total(self: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> jax.Array:
    dtype = _sum_dtype(self, dtype)
    wide = opmath(dtype)
    # a bool is summed as what it becomes; any other input enters torch's accumulation in the result's dtype
    values = cast(cast(self, dtype), wide)
    summed: jax.Array = cast(jnp.sum(values, axis=wrapped_dims(dim, self.ndim), keepdims=keepdim, dtype=wide), dtype)
    return summed


@lowers(aten.nansum.default)
def nansum(self: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> jax.Array:
    return total(jnp.where(self != self, jnp.zeros_like(self), self), dim, keepdim, dtype=dtype)


@lowers(aten.mean.default)
def mean(self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return mean_dim(self, None, False, dtype=dtype)


@lowers(aten.mean.dim)
def mean_dim(self: jax.Array, dim: Dims, keepdim: bool = False, *, dtype: DType | None = None) -> jax.Array:
    dtype = dtype or np.dtype(self.dtype)
    dims = wrapped_dims(dim, self.ndim)
    wide = opmath(dtype)
    summed = jnp.sum(cast(cast(self, dtype), wide), axis=dims, keepdims=keepdim, dtype=wide)
    averaged: jax.Array = cast(summed / _count(self, dims), dtype)
    return averaged


def _count(x: jax.Array, dims: Sequence[int]) -> float:
    return float(math.prod(x.shape[dim] for dim in dims)) or float("nan")


@lowers(aten.prod.default)
def prod(self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return _prod(self, None, False, dtype)


@lowers(aten.prod.dim_int)
def prod_dim(self: jax.Array, dim: int, keepdim: bool = False, *, dtype: DType | None = None) -> jax.Array:
    return _prod(self, dim, keepdim, dtype)


def _prod(x: jax.Array, dim: Dims, keepdim: bool, dtype: DType | None) -> jax.Array:
    dtype = _sum_dtype(x, dtype)
    wide = opmath(dtype)
    product: jax.Array = cast(
        jnp.prod(cast(cast(x, dtype), wide), axis=wrapped_dims(dim, x.ndim), keepdims=keepdim, dtype=wide), dtype
    )
    return product


# --- moments -------------------------------------------------------------------------------------------------------------------


def _var_mean(x: jax.Array, dim: Dims, correction: Number | None, keepdim: bool) -> tuple[jax.Array, jax.Array]:
    """Variance and mean in the accumulation dtype: two passes, as accurate as torch's Welford."""
    dims = wrapped_dims(dim, x.ndim)
    values = cast(x, opmath(x.dtype))
    count = math.prod(x.shape[d] for d in dims)
    average = jnp.sum(values, axis=dims, keepdims=True) / (float(count) or float("nan"))
    deviation = values - average
    squares = jnp.real(deviation) ** 2 + jnp.imag(deviation) ** 2 if is_complex(x.dtype) else deviation**2
    free = max(count - (1 if correction is None else float(correction)), 0.0)  # type: ignore[arg-type]
    variance = jnp.sum(squares, axis=dims, keepdims=keepdim) / np.asarray(free, squares.dtype)
    return variance, average if keepdim else lax.squeeze(average, dims)


@lowers(aten.var.correction)
def var(self: jax.Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> jax.Array:
    return _var_mean(self, dim, correction, keepdim)[0].astype(real_dtype(self.dtype))


@lowers(aten.var.dim)
def var_dim(self: jax.Array, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> jax.Array:
    return var(self, dim, correction=int(unbiased), keepdim=keepdim)


@lowers(aten.std.correction)
def std(self: jax.Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> jax.Array:
    return jnp.sqrt(_var_mean(self, dim, correction, keepdim)[0]).astype(real_dtype(self.dtype))


@lowers(aten.var_mean.correction)
def var_mean(
    self: jax.Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    variance, average = _var_mean(self, dim, correction, keepdim)
    return variance.astype(real_dtype(self.dtype)), average.astype(self.dtype)


@lowers(aten.std_mean.correction)
def std_mean(
    self: jax.Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    variance, average = _var_mean(self, dim, correction, keepdim)
    return jnp.sqrt(variance).astype(real_dtype(self.dtype)), average.astype(self.dtype)


# --- extremes ------------------------------------------------------------------------------------------------------------------


@lowers(aten.amax.default)
def amax(self: jax.Array, dim: Dims = (), keepdim: bool = False) -> jax.Array:
    return jnp.max(self, axis=wrapped_dims(dim, self.ndim), keepdims=keepdim)


@lowers(aten.amin.default)
def amin(self: jax.Array, dim: Dims = (), keepdim: bool = False) -> jax.Array:
    return jnp.min(self, axis=wrapped_dims(dim, self.ndim), keepdims=keepdim)


@lowers(aten.aminmax.default)
def aminmax(self: jax.Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    dims = None if dim is None else (dim,)
    return amin(self, dims, keepdim), amax(self, dims, keepdim)


@lowers(aten.max.default)
def max_all(self: jax.Array) -> jax.Array:
    return amax(self)


@lowers(aten.min.default)
def min_all(self: jax.Array) -> jax.Array:
    return amin(self)


def _arg_extreme(function: Callable[..., jax.Array], x: jax.Array, dim: int | None, keepdim: bool) -> jax.Array:
    """The first index of the extreme; the first NaN wins, as in torch."""
    if x.dtype == BOOL:
        x = x.astype(UINT8)
    if x.ndim == 0:
        return jnp.zeros((), INT64)
    if dim is None:
        index = function(x.reshape(-1), axis=0)
        return index.astype(INT64).reshape((1,) * x.ndim if keepdim else ())
    return function(x, axis=wrapped(dim, x.ndim), keepdims=keepdim).astype(INT64)


@lowers(aten.argmax.default)
def argmax(self: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    return _arg_extreme(jnp.argmax, self, dim, keepdim)


@lowers(aten.argmin.default)
def argmin(self: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    return _arg_extreme(jnp.argmin, self, dim, keepdim)


@lowers(aten.max.dim)
def max_dim(self: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return amax(self, dim, keepdim), argmax(self, dim, keepdim)


@lowers(aten.min.dim)
def min_dim(self: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return amin(self, dim, keepdim), argmin(self, dim, keepdim)


# --- truth ---------------------------------------------------------------------------------------------------------------------


def _truth(function: Callable[..., Any], x: jax.Array, dim: Dims, keepdim: bool) -> jax.Array:
    found = function(cast(x, BOOL), axis=wrapped_dims(dim, x.ndim), keepdims=keepdim)
    result: jax.Array = cast(found, UINT8 if x.dtype == UINT8 else BOOL)  # uint8 in, uint8 out, as torch has it
    return result


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_of(self: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return _truth(jnp.any, self, dim, keepdim)


@lowers(aten.all.default, aten.all.dim, aten.all.dims, aten._is_all_true.default)
def all_of(self: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return _truth(jnp.all, self, dim, keepdim)


@lowers(aten.count_nonzero.dim_IntList, aten.count_nonzero.default)
def count_nonzero(self: jax.Array, dim: Dims = None) -> jax.Array:
    return total(cast(self, BOOL), dim)


# --- logarithms and norms ------------------------------------------------------------------------------------------------------


@lowers(aten.logsumexp.default)
def logsumexp(self: jax.Array, dim: Dims, keepdim: bool = False) -> jax.Array:
    dtype = default_dtype() if is_integral(self.dtype) else np.dtype(self.dtype)
    values = cast(cast(self, dtype), opmath(dtype))
    return jax.nn.logsumexp(values, axis=wrapped_dims(dim, self.ndim), keepdims=keepdim).astype(dtype)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    self: jax.Array, ord: Number = 2, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None
) -> jax.Array:
    dtype = dtype or np.dtype(self.dtype)
    dims = wrapped_dims(dim, self.ndim)
    size = jnp.abs(cast(cast(self, dtype), opmath(dtype)))
    if ord == 0:
        norm = jnp.sum((size != 0).astype(size.dtype), axis=dims, keepdims=keepdim)
    elif ord == 1:
        norm = jnp.sum(size, axis=dims, keepdims=keepdim)
    elif ord == 2:
        norm = jnp.sqrt(jnp.sum(size * size, axis=dims, keepdims=keepdim))
    elif ord == math.inf:
        norm = jnp.max(size, axis=dims, keepdims=keepdim)
    elif ord == -math.inf:
        norm = jnp.min(size, axis=dims, keepdims=keepdim)
    else:
        assert not isinstance(ord, complex)
        norm = jnp.sum(size**ord, axis=dims, keepdims=keepdim) ** (1.0 / ord)
    return norm.astype(real_dtype(dtype))


@lowers(aten.norm.ScalarOpt_dim)
def norm_dim(self: jax.Array, p: Number | None, dim: Dims, keepdim: bool = False) -> jax.Array:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


@lowers(aten.norm.Scalar)
def norm_all(self: jax.Array, p: Number = 2) -> jax.Array:
    return vector_norm(self, p)


@lowers(aten.dist.default)
def dist(self: jax.Array, other: jax.Array, p: Number = 2) -> jax.Array:
    return vector_norm(self - other, p)


# --- softmax -------------------------------------------------------------------------------------------------------------------


def _softmax_values(x: jax.Array, half_to_float: bool) -> tuple[jax.Array, DType]:
    """The values in the accumulation dtype, and the result's dtype."""
    result = opmath(x.dtype) if half_to_float else np.dtype(x.dtype)
    return cast(x, opmath(x.dtype)), result


@lowers(aten._softmax.default)
def softmax(self: jax.Array, dim: int, half_to_float: bool) -> jax.Array:
    values, dtype = _softmax_values(self, half_to_float)
    if self.ndim == 0:
        return jnp.exp(values - values).astype(dtype)  # 1, but NaN for what is not finite
    return _shifted_softmax(values, dim).astype(dtype)


def _shifted_softmax(values: jax.Array, dim: int) -> jax.Array:
    """A row of -inf alone is NaN, as in torch; jax.nn.softmax gives the same, but its gradient rule is of no use here."""
    powers = jnp.exp(values - jnp.max(values, axis=dim, keepdims=True, initial=-jnp.inf))
    return powers / jnp.sum(powers, axis=dim, keepdims=True)


@lowers(aten._log_softmax.default)
def log_softmax(self: jax.Array, dim: int, half_to_float: bool) -> jax.Array:
    values, dtype = _softmax_values(self, half_to_float)
    if self.ndim == 0:
        return (values - values).astype(dtype)  # 0, but NaN for what is not finite
    shifted = values - jnp.max(values, axis=dim, keepdims=True, initial=-jnp.inf)
    return (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=dim, keepdims=True))).astype(dtype)


@lowers(aten._safe_softmax.default)
def safe_softmax(self: jax.Array, dim: int, dtype: DType | None = None) -> jax.Array:
    """A row of -inf alone is zero instead of NaN."""
    x = self if dtype is None else cast(self, dtype)
    masked = jnp.all(x == -jnp.inf, axis=dim, keepdims=True)
    return jnp.where(masked, jnp.zeros_like(x), softmax(x, dim, False))


@lowers(aten._softmax_backward_data.default)
def softmax_backward(grad_output: jax.Array, output: jax.Array, dim: int, input_dtype: DType) -> jax.Array:
    wide = opmath(grad_output.dtype)
    grad, out = cast(grad_output, wide), cast(output, wide)
    if grad.ndim == 0:
        return jnp.zeros_like(grad).astype(input_dtype)
    return (out * (grad - jnp.sum(grad * out, axis=dim, keepdims=True))).astype(input_dtype)


@lowers(aten._log_softmax_backward_data.default)
def log_softmax_backward(grad_output: jax.Array, output: jax.Array, dim: int, input_dtype: DType) -> jax.Array:
    wide = opmath(grad_output.dtype)
    grad, out = cast(grad_output, wide), cast(output, wide)
    if grad.ndim == 0:
        return jnp.zeros_like(grad).astype(input_dtype)
    return (grad - jnp.exp(out) * jnp.sum(grad, axis=dim, keepdims=True)).astype(input_dtype)
