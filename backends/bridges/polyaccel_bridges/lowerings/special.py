"""Special functions beyond the elementary ones: incomplete gamma, zeta, modified Bessel functions, normal quantiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.scipy import special
from torch._ops import OpOverload

from .promotion import Number, cast, compute, float_dtype, opmath
from .table import lowers

aten = torch.ops.aten


def _unary(function: Callable[[jax.Array], Any], *overloads: OpOverload) -> None:
    def lowering(self: jax.Array) -> jax.Array:
        return compute(function, float_dtype(self), self)

    lowers(*overloads)(lowering)


def _entr(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), x, special.entr(x))


def _erfcx(x: jax.Array) -> jax.Array:
    """exp(x^2) erfc(x). Below 2 as it stands in float64; beyond, by Laplace's continued fraction, which needs no exponent."""
    wide = x.astype(jnp.float64)
    near = jnp.exp(jnp.minimum(wide, 5.0) ** 2) * lax.erfc(jnp.minimum(wide, 5.0))
    far = jnp.maximum(wide, 2.0)
    tail = far
    for k in range(60, 0, -1):
        tail = far + (k / 2) / tail
    # the fraction's last denominator is `far` itself: 1 / (sqrt(pi) (x + (1/2)/(x + 1/(x + (3/2)/(x + ...)))))
    return jnp.where(wide < 2.0, near, 1 / (np.sqrt(np.pi) * tail)).astype(x.dtype)


_unary(special.i0, aten.i0.default)
_unary(special.i0e, aten.special_i0e.default)
_unary(special.i1, aten.special_i1.default)
_unary(special.i1e, aten.special_i1e.default)
_unary(special.ndtri, aten.special_ndtri.default)
_unary(special.log_ndtr, aten.special_log_ndtr.default)
_unary(_entr, aten.special_entr.default)
_unary(_erfcx, aten.special_erfcx.default)


def _binary(function: Callable[[jax.Array, jax.Array], Any], *overloads: OpOverload) -> None:
    def lowering(self: jax.Array | Number, other: jax.Array | Number) -> jax.Array:
        return compute(function, float_dtype(self, other), self, other)

    lowers(*overloads)(lowering)


def _xlogy(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(y), y, jnp.where(x == 0, jnp.zeros_like(x * y), x * jnp.log(y)))


def _xlog1py(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(y), y, jnp.where(x == 0, jnp.zeros_like(x * y), x * jnp.log1p(y)))


_binary(_xlogy, aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
_binary(
    _xlog1py,
    aten.special_xlog1py.default,
    aten.special_xlog1py.other_scalar,
    aten.special_xlog1py.self_scalar,
)


def _zeta(x: jax.Array, q: jax.Array) -> jax.Array:
    """Hurwitz zeta with torch's edges: infinite at x = 1, NaN below 1 and for a negative q with a fractional x."""
    poles = (q <= 0) & (q == jnp.floor(q))
    shifted = special.zeta(x, jnp.where(q <= 0, jnp.ones_like(q), q))
    # a negative q is moved into the positive ones by its defining sum, term by term
    terms = jnp.zeros_like(shifted)
    position = q
    for _ in range(10):
        negative = position <= 0
        terms = terms + jnp.where(negative, jnp.where(negative, position, 1.0) ** -x, 0.0)
        position = jnp.where(negative, position + 1, position)
    moved = special.zeta(x, jnp.where(position > 0, position, 1.0)) + terms
    out = jnp.where(q > 0, shifted, jnp.where(x == jnp.floor(x), moved, jnp.nan))
    out = jnp.where(poles, jnp.inf, out)
    out = jnp.where(x == 1, jnp.inf, out)
    return jnp.where(x < 1, jnp.nan, out)


_binary(
    lambda x, q: _zeta(*jnp.broadcast_arrays(x, q)),
    aten.special_zeta.default,
    aten.special_zeta.self_scalar,
    aten.special_zeta.other_scalar,
)
_binary(special.gammainc, aten.igamma.default)
_binary(special.gammaincc, aten.igammac.default)


@lowers(aten.polygamma.default)
def polygamma(n: int, self: jax.Array) -> jax.Array:
    dtype = float_dtype(self)
    x = cast(cast(self, dtype), opmath(dtype))
    if n == 0:
        at_zero = jnp.where(jnp.signbit(x), jnp.inf, -jnp.inf).astype(x.dtype)
        return jnp.where(x == 0, at_zero, lax.digamma(x)).astype(dtype)
    if n == 1:
        return _trigamma(x).astype(dtype)
    factorial = float(np.prod(np.arange(1, n + 1, dtype=np.float64)))
    sign = -1.0 if n % 2 == 0 else 1.0
    values = sign * factorial * _zeta(jnp.full_like(x, n + 1), x)
    return values.astype(dtype)


def _trigamma(x: jax.Array) -> jax.Array:
    """Reflected below 1/2, then six steps up and the asymptotic series."""
    reflected = x < 0.5
    sine = jnp.sin(np.pi * x)
    z = jnp.where(reflected, 1 - x, x)
    total = jnp.zeros_like(x)
    for _ in range(6):
        total = total + 1 / (z * z)
        z = z + 1
    square = 1 / (z * z)
    series = (1 / 6 - square * (1 / 30 - square * (1 / 42 - square * (1 / 30)))) * square
    total = total + (1 + 0.5 / z + series) / z
    return jnp.where(reflected, (np.pi * np.pi) / (sine * sine) - total, total)


@lowers(aten.mvlgamma.default)
def mvlgamma(self: jax.Array, p: int) -> jax.Array:
    def values(x: jax.Array) -> jax.Array:
        total = sum(lax.lgamma(x - k / 2) for k in range(p))
        return total + p * (p - 1) / 4 * np.log(np.pi)

    return compute(values, float_dtype(self), self)
