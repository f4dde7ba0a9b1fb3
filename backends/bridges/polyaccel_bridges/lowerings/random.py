"""Random draws. Each gets its own key; the distributions are torch's, the numbers are jax's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .table import lowers

aten = torch.ops.aten
DType = np.dtype[Any]


def _uniform(key: jax.Array, shape: Sequence[int], dtype: DType | None) -> jax.Array:
    """In [0, 1), drawn in at least 32 bits where the dtype has fewer (rounding up to 1 is kept out, as torch does)."""
    dtype = np.dtype(np.float32) if dtype is None else np.dtype(dtype)
    return jax.random.uniform(key, tuple(shape), dtype)


def _normal(key: jax.Array, shape: Sequence[int], dtype: DType | None) -> jax.Array:
    return jax.random.normal(key, tuple(shape), np.float32 if dtype is None else dtype)


def _happens(key: jax.Array, p: Any, shape: Sequence[int]) -> jax.Array:
    """True with probability `p`, drawn in 32 bits whatever the dtype of `p`."""
    return jax.random.uniform(key, tuple(shape), np.float32) < p


@lowers(aten.native_dropout.default, is_random=True)
def native_dropout(
    key: jax.Array, input: jax.Array, p: float, train: bool | None
) -> tuple[jax.Array, jax.Array]:
    if train is False or p == 0:
        return input, jnp.ones(input.shape, np.bool_)
    if p == 1:
        return jnp.zeros_like(input), jnp.zeros(input.shape, np.bool_)
    kept = _happens(key, np.float32(1 - p), input.shape)
    return jnp.where(kept, input * jnp.asarray(1 / (1 - p), input.dtype), 0), kept


@lowers(aten.bernoulli.default, is_random=True)
def bernoulli(key: jax.Array, self: jax.Array) -> jax.Array:
    return _happens(key, self.astype(np.float32), self.shape).astype(self.dtype)


@lowers(aten.bernoulli.p, is_random=True)
def bernoulli_p(key: jax.Array, self: jax.Array, p: float) -> jax.Array:
    return _happens(key, np.float32(p), self.shape).astype(self.dtype)


@lowers(aten.rand.default, is_random=True)
def rand(key: jax.Array, size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _uniform(key, size, dtype)


@lowers(aten.rand_like.default, is_random=True)
def rand_like(key: jax.Array, self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return _uniform(key, self.shape, self.dtype if dtype is None else dtype)


@lowers(aten.randn.default, is_random=True)
def randn(key: jax.Array, size: Sequence[int], *, dtype: DType | None = None) -> jax.Array:
    return _normal(key, size, dtype)


@lowers(aten.randn_like.default, is_random=True)
def randn_like(key: jax.Array, self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return _normal(key, self.shape, self.dtype if dtype is None else dtype)
