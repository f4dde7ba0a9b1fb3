"""Random draws. Each gets its own key; the distributions are torch's, the numbers are jax's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import is_complex, real_dtype
from .table import lowers

aten = torch.ops.aten
DType = np.dtype[Any]
_INT64 = np.dtype(np.int64)


def _uniform(key: jax.Array, shape: Sequence[int], dtype: DType | None) -> jax.Array:
    """In [0, 1), drawn in at least 32 bits where the dtype has fewer (rounding up to 1 is kept out, as torch does)."""
    dtype = np.dtype(np.float32) if dtype is None else np.dtype(dtype)
    return jax.random.uniform(key, tuple(shape), dtype)


def _normal(key: jax.Array, shape: Sequence[int], dtype: DType | None) -> jax.Array:
    return jax.random.normal(key, tuple(shape), np.float32 if dtype is None else dtype)


def _smallest(dtype: DType) -> float:
    """The smallest positive normal number; draws that torch keeps off 0 are at least this."""
    return float(jnp.finfo(dtype).tiny)


def _happens(key: jax.Array, p: Any, shape: Sequence[int]) -> jax.Array:
    """True with probability `p`, drawn in 32 bits whatever the dtype of `p`."""
    happens: jax.Array = jax.random.uniform(key, tuple(shape), np.float32) < p
    return happens


@lowers(aten.native_dropout.default, is_random=True)
def native_dropout(key: jax.Array, input: jax.Array, p: float, train: bool | None) -> tuple[jax.Array, jax.Array]:
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


def _integers(key: jax.Array, shape: Sequence[int], low: Any, high: Any, dtype: DType) -> jax.Array:
    drawn = jax.random.randint(key, tuple(shape), low, high, np.int64)
    return drawn.astype(dtype)


@lowers(aten.randint.default, is_random=True)
def randint(key: jax.Array, high: int, size: Sequence[int], *, dtype: DType = _INT64) -> jax.Array:
    return _integers(key, size, 0, high, dtype)


@lowers(aten.randint.low, is_random=True)
def randint_low(key: jax.Array, low: int, high: int, size: Sequence[int], *, dtype: DType = _INT64) -> jax.Array:
    return _integers(key, size, low, high, dtype)


@lowers(aten.randint_like.default, is_random=True)
def randint_like(key: jax.Array, self: jax.Array, high: int, *, dtype: DType | None = None) -> jax.Array:
    return _integers(key, self.shape, 0, high, self.dtype if dtype is None else dtype)


@lowers(aten.randint_like.low_dtype, is_random=True)
def randint_like_low(key: jax.Array, self: jax.Array, low: int, high: int, *, dtype: DType | None = None) -> jax.Array:
    return _integers(key, self.shape, low, high, self.dtype if dtype is None else dtype)


def _largest_random(dtype: DType) -> int:
    """torch's upper bound of `random_()`: every integer that the dtype holds exactly, counted from 0."""
    if jnp.issubdtype(dtype, np.floating):
        return int(2 ** (jnp.finfo(dtype).nmant + 1))
    return 1 if dtype == np.bool_ else int(np.iinfo(dtype).max)


@lowers(aten.random.default, is_random=True)
def random_(key: jax.Array, self: jax.Array) -> jax.Array:
    top = _largest_random(self.dtype)
    return _integers(key, self.shape, 0, top + (top < 2**63 - 1), self.dtype)


@lowers(aten.random.to, is_random=True)
def random_to(key: jax.Array, self: jax.Array, to: int) -> jax.Array:
    return _integers(key, self.shape, 0, to, self.dtype)


@lowers(aten.randperm.default, is_random=True)
def randperm(key: jax.Array, n: int, *, dtype: DType = _INT64) -> jax.Array:
    return jax.random.permutation(key, jnp.arange(n, dtype=dtype))


@lowers(aten.normal_functional.default, is_random=True)
def normal_functional(key: jax.Array, self: jax.Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    return _shifted(_normal(key, self.shape, self.dtype), mean, std)


@lowers(aten.normal.float_float, is_random=True)
def normal_float_float(
    key: jax.Array, mean: float, std: float, size: Sequence[int], *, dtype: DType | None = None
) -> jax.Array:
    return _shifted(_normal(key, size, dtype), mean, std)


@lowers(aten.normal.Tensor_float, is_random=True)
def normal_tensor_float(key: jax.Array, mean: jax.Array, std: float = 1.0) -> jax.Array:
    return _shifted(_normal(key, mean.shape, mean.dtype), mean, std)


@lowers(aten.normal.float_Tensor, is_random=True)
def normal_float_tensor(key: jax.Array, mean: float, std: jax.Array) -> jax.Array:
    return _shifted(_normal(key, std.shape, std.dtype), mean, std)


@lowers(aten.normal.Tensor_Tensor, is_random=True)
def normal_tensor_tensor(key: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return _shifted(_normal(key, jnp.broadcast_shapes(mean.shape, std.shape), mean.dtype), mean, std)


def _shifted(standard: jax.Array, mean: Any, std: Any) -> jax.Array:
    return standard * jnp.asarray(std, standard.dtype) + jnp.asarray(mean, standard.dtype)


@lowers(aten.log_normal.default, is_random=True)
def log_normal(key: jax.Array, self: jax.Array, mean: float = 1.0, std: float = 2.0) -> jax.Array:
    return jnp.exp(_shifted(_normal(key, self.shape, self.dtype), mean, std))


@lowers(aten.uniform.default, is_random=True)
def uniform(key: jax.Array, self: jax.Array, low: float = 0.0, high: float = 1.0) -> jax.Array:
    if is_complex(self.dtype):  # both parts, as torch does
        parts = uniform(key, jnp.zeros((*self.shape, 2), real_dtype(self.dtype)), low, high)
        return lax.complex(parts[..., 0], parts[..., 1])
    drawn = _uniform(key, self.shape, self.dtype)
    return drawn * jnp.asarray(high - low, self.dtype) + jnp.asarray(low, self.dtype)


@lowers(aten.exponential.default, is_random=True)
def exponential(key: jax.Array, self: jax.Array, lambd: float = 1.0) -> jax.Array:
    # Never 0, as torch promises: log and division follow (Gumbel noise).
    drawn = jax.random.exponential(key, self.shape, self.dtype)
    return jnp.maximum(drawn, _smallest(self.dtype)) / jnp.asarray(lambd, self.dtype)


@lowers(aten.cauchy.default, is_random=True)
def cauchy(key: jax.Array, self: jax.Array, median: float = 0.0, sigma: float = 1.0) -> jax.Array:
    return _shifted(jax.random.cauchy(key, self.shape, self.dtype), median, sigma)


@lowers(aten.geometric.default, is_random=True)
def geometric(key: jax.Array, self: jax.Array, p: float) -> jax.Array:
    return jax.random.geometric(key, np.float32(p), self.shape, np.int64).astype(self.dtype)


@lowers(aten.poisson.default, is_random=True)
def poisson(key: jax.Array, self: jax.Array) -> jax.Array:
    return jax.random.poisson(key, self, self.shape, np.int64).astype(self.dtype)


@lowers(aten.binomial.default, is_random=True)
def binomial(key: jax.Array, count: jax.Array, prob: jax.Array) -> jax.Array:
    return jax.random.binomial(key, count, prob, count.shape, count.dtype)


@lowers(aten.multinomial.default, is_random=True)
def multinomial(key: jax.Array, self: jax.Array, num_samples: int, replacement: bool = False) -> jax.Array:
    """Indices by their weight (rows need not sum to 1); without replacement by Gumbel's top-k (arXiv:1903.06059)."""
    logits = jnp.log(self.astype(jnp.promote_types(self.dtype, np.float32)))
    if replacement:
        drawn = jax.random.categorical(key, logits[..., None, :], -1, (*self.shape[:-1], num_samples))
        return drawn.astype(np.int64)
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.lax.top_k(noisy, num_samples)[1].astype(np.int64)


@lowers(aten._standard_gamma.default, is_random=True)
def _standard_gamma(key: jax.Array, self: jax.Array) -> jax.Array:
    drawn = jax.random.gamma(key, self, self.shape, self.dtype)
    return jnp.maximum(drawn, _smallest(self.dtype))


@lowers(aten._standard_gamma_grad.default)
def _standard_gamma_grad(self: jax.Array, output: jax.Array) -> jax.Array:
    gradient: jax.Array = jax.lax.random_gamma_grad(self, output)
    return gradient


@lowers(aten.rrelu_with_noise_functional.default, is_random=True)
def rrelu_with_noise_functional(
    key: jax.Array,
    self: jax.Array,
    noise: jax.Array,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
) -> tuple[jax.Array, jax.Array]:
    if not training:
        slope = jnp.asarray((lower + upper) / 2, self.dtype)
        return jnp.where(self <= 0, self * slope, self), noise
    slopes = _uniform(key, self.shape, self.dtype) * jnp.asarray(upper - lower, self.dtype)
    slopes = jnp.where(self <= 0, slopes + jnp.asarray(lower, self.dtype), jnp.ones_like(self))
    return self * slopes, slopes
