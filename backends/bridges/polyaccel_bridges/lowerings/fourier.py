"""Discrete Fourier transforms over any number of dims, with ATen's three normalizations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch

from .promotion import cast, complex_dtype, real_dtype
from .table import lowers
from .views import wrapped

aten = torch.ops.aten

_XLA_RANK = 3  # the most dims that one XLA transform takes


def _scaled(x: jax.Array, normalization: int, lengths: Sequence[int]) -> jax.Array:
    """0: none, 1: by the square root of the signal's size, 2: by its size."""
    size = math.prod(lengths)
    if normalization == 0 or size == 0:
        return x
    factor = 1 / math.sqrt(size) if normalization == 1 else 1 / size
    return x * cast(factor, real_dtype(x.dtype))


def _transform(x: jax.Array, dims: Sequence[int], forward: bool) -> jax.Array:
    """Unscaled in both directions."""
    for start in range(0, len(dims), _XLA_RANK):
        axes = tuple(dims[start : start + _XLA_RANK])
        x = jnp.fft.fftn(x, axes=axes) if forward else jnp.fft.ifftn(x, axes=axes, norm="forward")
    return x


@lowers(aten._fft_c2c.default)
def fft_c2c(self: jax.Array, dim: Sequence[int], normalization: int, forward: bool) -> jax.Array:
    dims = [wrapped(d, self.ndim) for d in dim]
    return _scaled(_transform(self, dims, forward), normalization, [self.shape[d] for d in dims])


@lowers(aten._fft_r2c.default)
def fft_r2c(self: jax.Array, dim: Sequence[int], normalization: int, onesided: bool) -> jax.Array:
    dims = [wrapped(d, self.ndim) for d in dim]
    if onesided:
        out = _transform(jnp.fft.rfft(self, axis=dims[-1]), dims[:-1], True)
    else:
        out = _transform(cast(self, complex_dtype(self.dtype)), dims, True)
    return _scaled(out, normalization, [self.shape[d] for d in dims])


@lowers(aten._fft_c2r.default)
def fft_c2r(self: jax.Array, dim: Sequence[int], normalization: int, last_dim_size: int) -> jax.Array:
    dims = [wrapped(d, self.ndim) for d in dim]
    half = _transform(self, dims[:-1], False)
    out = jnp.fft.irfft(half, n=last_dim_size, axis=dims[-1], norm="forward")
    return _scaled(out, normalization, [out.shape[d] for d in dims])
