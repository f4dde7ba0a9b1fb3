"""Elementwise arithmetic, comparisons, logic and bit operations with torch's promotion, rounding and NaN rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch._ops import OpOverload

from .promotion import (
    BOOL,
    INT32,
    Number,
    cast,
    compute,
    float_dtype,
    is_complex,
    is_float,
    is_integral,
    opmath,
    result_dtype,
)
from .table import lowers

aten = torch.ops.aten
Operand = jax.Array | Number


# --- one operand ---------------------------------------------------------------------------------------------------------------


def _float_unary(function: Callable[[jax.Array], Any], *overloads: OpOverload) -> None:
    """Register a function whose result is floating: integers go to the default dtype first."""

    def lowering(self: jax.Array) -> jax.Array:
        return compute(function, float_dtype(self), self)

    lowers(*overloads)(lowering)


def _rsqrt(x: jax.Array) -> jax.Array:
    return lax.rsqrt(x) if not jnp.issubdtype(x.dtype, jnp.complexfloating) else 1 / jnp.sqrt(x)


def _digamma(x: jax.Array) -> jax.Array:
    at_zero = jnp.where(jnp.signbit(x), jnp.inf, -jnp.inf).astype(x.dtype)
    return jnp.where(x == 0, at_zero, lax.digamma(x))


def _lgamma(x: jax.Array) -> jax.Array:
    return lax.lgamma(x)


for _function, _name in (
    (jnp.arccos, "acos"),
    (jnp.arccosh, "acosh"),
    (jnp.arcsin, "asin"),
    (jnp.arcsinh, "asinh"),
    (jnp.arctan, "atan"),
    (jnp.arctanh, "atanh"),
    (jnp.cos, "cos"),
    (jnp.cosh, "cosh"),
    (_digamma, "digamma"),
    (lax.erf, "erf"),
    (lax.erfc, "erfc"),
    (lax.erf_inv, "erfinv"),
    (jnp.exp, "exp"),
    (jnp.exp2, "exp2"),
    (jnp.expm1, "expm1"),
    (_lgamma, "lgamma"),
    (jnp.log, "log"),
    (jnp.log10, "log10"),
    (jnp.log1p, "log1p"),
    (jnp.log2, "log2"),
    (jnp.reciprocal, "reciprocal"),
    (_rsqrt, "rsqrt"),
    (jax.nn.sigmoid, "sigmoid"),
    (jnp.sin, "sin"),
    (jnp.sinc, "sinc"),
    (jnp.sinh, "sinh"),
    (jnp.sqrt, "sqrt"),
    (jnp.tan, "tan"),
    (jnp.tanh, "tanh"),
    (jnp.deg2rad, "deg2rad"),
    (jnp.rad2deg, "rad2deg"),
):
    _float_unary(_function, getattr(aten, _name).default)


@lowers(aten.abs.default)
def absolute(self: jax.Array) -> jax.Array:
    return compute(jnp.abs, self.dtype, self) if not is_complex(self.dtype) else jnp.abs(self)


@lowers(aten.angle.default)
def angle(self: jax.Array) -> jax.Array:
    if is_complex(self.dtype):
        return jnp.angle(self)
    dtype = float_dtype(self)
    x = cast(self, dtype)
    return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.asarray(np.pi, dtype), jnp.asarray(0, dtype)))


@lowers(aten.neg.default)
def negative(self: jax.Array) -> jax.Array:
    return -self


def _rounding(function: Callable[[jax.Array], Any], overload: OpOverload) -> None:
    def lowering(self: jax.Array) -> jax.Array:
        return self if is_integral(self.dtype) else function(self)

    lowers(overload)(lowering)


_rounding(jnp.ceil, aten.ceil.default)
_rounding(jnp.floor, aten.floor.default)
_rounding(jnp.trunc, aten.trunc.default)
_rounding(lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), aten.round.default)
_rounding(lambda x: x - jnp.trunc(x), aten.frac.default)


@lowers(aten.round.decimals)
def round_decimals(self: jax.Array, *, decimals: int) -> jax.Array:
    if decimals == 0 or is_integral(self.dtype):
        return self if is_integral(self.dtype) else lax.round(self, lax.RoundingMethod.TO_NEAREST_EVEN)
    scale = 10.0 ** abs(decimals)

    def scaled(x: jax.Array) -> jax.Array:
        up = x * scale if decimals > 0 else x / scale
        nearest = lax.round(up, lax.RoundingMethod.TO_NEAREST_EVEN)
        return nearest / scale if decimals > 0 else nearest * scale

    return compute(scaled, self.dtype, self)


@lowers(aten.sign.default)
def sign(self: jax.Array) -> jax.Array:
    if self.dtype == BOOL:
        return self
    # torch's sign(nan) is 0, jnp's is nan
    return jnp.where(jnp.isnan(self), jnp.zeros_like(self), jnp.sign(self)) if is_float(self.dtype) else jnp.sign(self)


@lowers(aten.sgn.default)
def sgn(self: jax.Array) -> jax.Array:
    if not is_complex(self.dtype):
        return sign(self)
    size = jnp.abs(self)
    return jnp.where(size == 0, jnp.zeros_like(self), self / size)


@lowers(aten.signbit.default)
def signbit(self: jax.Array) -> jax.Array:
    if self.dtype == BOOL:
        return jnp.zeros_like(self)
    return jnp.signbit(self) if is_float(self.dtype) else self < 0


@lowers(aten.isnan.default)
def isnan(self: jax.Array) -> jax.Array:
    return self != self


def _classification(function: Callable[[jax.Array], Any], *overloads: OpOverload) -> None:
    def lowering(self: jax.Array) -> jax.Array:
        return (
            function(self) if not is_integral(self.dtype) else function(jnp.zeros(self.shape, jnp.dtype(jnp.float32)))
        )

    lowers(*overloads)(lowering)


_classification(jnp.isinf, aten.isinf.default)
_classification(jnp.isposinf, aten.isposinf.default)
_classification(jnp.isneginf, aten.isneginf.default)


@lowers(aten.nan_to_num.default)
def nan_to_num(
    self: jax.Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> jax.Array:
    if is_integral(self.dtype):
        return self
    if is_complex(self.dtype):
        return lax.complex(
            nan_to_num(jnp.real(self), nan, posinf, neginf), nan_to_num(jnp.imag(self), nan, posinf, neginf)
        )
    limits = jnp.finfo(self.dtype)
    out = jnp.where(jnp.isnan(self), cast(0.0 if nan is None else nan, self.dtype), self)
    out = jnp.where(self == jnp.inf, limits.max if posinf is None else cast(posinf, self.dtype), out)
    return jnp.where(self == -jnp.inf, limits.min if neginf is None else cast(neginf, self.dtype), out)


@lowers(aten.frexp.Tensor)
def frexp(self: jax.Array) -> tuple[jax.Array, jax.Array]:
    mantissa, exponent = jnp.frexp(cast(self, opmath(self.dtype)))
    return mantissa.astype(self.dtype), exponent.astype(INT32)


# --- two operands --------------------------------------------------------------------------------------------------------------


def _scaled(other: Operand, alpha: Number) -> Operand:
    return other if isinstance(alpha, (int, float)) and alpha == 1 else other * alpha


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(self: Operand, other: Operand, alpha: Number = 1) -> jax.Array:
    dtype = result_dtype(self, other)
    if dtype == BOOL:
        return cast(self, dtype) | (cast(other, dtype) if alpha else jnp.asarray(False))
    return compute(lambda a, b: a + _scaled(b, alpha), dtype, self, other)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(self: Operand, other: Operand, alpha: Number = 1) -> jax.Array:
    return compute(lambda a, b: a - _scaled(b, alpha), result_dtype(self, other), self, other)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(self: Operand, other: Operand, alpha: Number = 1) -> jax.Array:
    return sub(other, self, alpha)


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def mul(self: Operand, other: Operand) -> jax.Array:
    return compute(jnp.multiply, result_dtype(self, other), self, other)


def _floor_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Torch's floor division of floats: the quotient of the exact remainder, so that 1e20 // 1e-5 does not drift."""
    remainder = lax.rem(a, b)
    quotient = (a - remainder) / b
    quotient = jnp.where((remainder != 0) & ((b < 0) != (remainder < 0)), quotient - 1, quotient)
    floored = jnp.floor(quotient)
    floored = jnp.where(quotient - floored > 0.5, floored + 1, floored)
    floored = jnp.where(quotient != 0, floored, jnp.copysign(jnp.zeros_like(a), a / b))
    return jnp.where(b == 0, a / b, floored)


@lowers(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def div(self: Operand, other: Operand, rounding_mode: str | None = None) -> jax.Array:
    if rounding_mode is None:
        return compute(jnp.true_divide, float_dtype(self, other), self, other)
    dtype = result_dtype(self, other)
    if rounding_mode == "trunc":
        if is_integral(dtype):
            return compute(lambda a, b: lax.div(*jnp.broadcast_arrays(a, b)), dtype, self, other)
        # torch rounds a narrow quotient before it truncates it
        kept = jnp.finfo(dtype)
        return compute(lambda a, b: jnp.trunc(lax.reduce_precision(a / b, kept.nexp, kept.nmant)), dtype, self, other)
    if is_integral(dtype):
        return compute(jnp.floor_divide, dtype, self, other)
    return compute(lambda a, b: _floor_divide(*jnp.broadcast_arrays(a, b)), dtype, self, other)


@lowers(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(self: Operand, other: Operand) -> jax.Array:
    return div(self, other, "floor")


@lowers(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(self: Operand, other: Operand) -> jax.Array:
    """The remainder with the sign of the divisor (Python's `%`)."""
    return compute(jnp.remainder, result_dtype(self, other), self, other)


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(self: Operand, other: Operand) -> jax.Array:
    """The remainder with the sign of the dividend (C's `fmod`)."""
    return compute(lambda a, b: lax.rem(*jnp.broadcast_arrays(a, b)), result_dtype(self, other), self, other)


def _integer_power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """Torch's integer power: wraps around, and a negative exponent gives 0 unless the base is 1 or -1."""
    positive = jnp.power(base, jnp.maximum(exponent, 0))
    if not jnp.issubdtype(exponent.dtype, jnp.signedinteger):
        return positive
    odd = exponent % 2 != 0
    negative = jnp.where(base == 1, 1, jnp.where(base == -1, jnp.where(odd, -1, 1), 0)).astype(base.dtype)
    return jnp.where(exponent < 0, negative, positive)


@lowers(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(self: Operand, exponent: Operand) -> jax.Array:
    dtype = result_dtype(self, exponent)
    if dtype == BOOL:
        return cast(self, BOOL) | ~cast(exponent, BOOL)
    return compute(_integer_power if is_integral(dtype) else jnp.power, dtype, self, exponent)


@lowers(aten.pow.Tensor_Scalar)
def pow_scalar(self: jax.Array, exponent: Number) -> jax.Array:
    dtype = result_dtype(self, exponent)
    if is_complex(dtype) or is_integral(dtype):
        # small powers are products: exact, and cheaper than a loop or a complex logarithm
        if isinstance(exponent, int) and not isinstance(exponent, bool) and 1 <= exponent <= 3 and dtype != BOOL:
            return lax.integer_pow(cast(self, dtype), exponent)
        return power(self, exponent)
    if exponent == 0.5:
        return compute(jnp.sqrt, dtype, self)
    if exponent == -0.5:
        return compute(lax.rsqrt, dtype, self)
    if isinstance(exponent, (int, float)) and exponent in (-2, -1, 0, 1, 2, 3):
        return compute(lambda x: lax.integer_pow(x, int(exponent)), dtype, self)
    return power(self, exponent)


@lowers(aten.atan2.default)
def atan2(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.arctan2, float_dtype(self, other), self, other)


@lowers(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(self: Operand, other: Operand) -> jax.Array:
    return compute(jnp.copysign, float_dtype(self, other), self, other)


@lowers(aten.hypot.default)
def hypot(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.hypot, result_dtype(self, other), self, other)


@lowers(aten.nextafter.default)
def nextafter(self: jax.Array, other: jax.Array) -> jax.Array:
    dtype = result_dtype(self, other)
    return lax.nextafter(*jnp.broadcast_arrays(cast(self, dtype), cast(other, dtype)))


@lowers(aten.ldexp.Tensor)
def ldexp(self: jax.Array, other: jax.Array) -> jax.Array:
    return mul(self, power(2.0, other))


@lowers(aten.logaddexp.default)
def logaddexp(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.logaddexp, float_dtype(self, other), self, other)


@lowers(aten.logaddexp2.default)
def logaddexp2(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.logaddexp2, float_dtype(self, other), self, other)


@lowers(aten.gcd.default)
def gcd(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.gcd, result_dtype(self, other), self, other)


@lowers(aten.lcm.default)
def lcm(self: jax.Array, other: jax.Array) -> jax.Array:
    return compute(jnp.lcm, result_dtype(self, other), self, other)


@lowers(aten.heaviside.default)
def heaviside(self: jax.Array, values: jax.Array) -> jax.Array:
    step = jnp.where(self > 0, jnp.ones_like(self), jnp.zeros_like(self))
    return jnp.where(self == 0, values, step)


@lowers(aten.addcmul.default)
def addcmul(self: jax.Array, tensor1: jax.Array, tensor2: jax.Array, value: Number = 1) -> jax.Array:
    return compute(
        lambda x, a, b: x + _scaled(a, value) * b, result_dtype(self, tensor1, tensor2), self, tensor1, tensor2
    )


@lowers(aten.addcdiv.default)
def addcdiv(self: jax.Array, tensor1: jax.Array, tensor2: jax.Array, value: Number = 1) -> jax.Array:
    return compute(
        lambda x, a, b: x + _scaled(a, value) / b, result_dtype(self, tensor1, tensor2), self, tensor1, tensor2
    )


@lowers(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(self: jax.Array, end: jax.Array, weight: Operand) -> jax.Array:
    def interpolate(a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        near_start = jnp.abs(w) < 0.5
        return jnp.where(near_start, a + w * (b - a), b - (b - a) * (1 - w))

    return compute(interpolate, result_dtype(self, end), self, end, weight)


# --- extremes ------------------------------------------------------------------------------------------------------------------


def _extreme(function: Callable[[jax.Array, jax.Array], Any], *overloads: OpOverload) -> None:
    def lowering(self: jax.Array, other: jax.Array) -> jax.Array:
        return compute(function, result_dtype(self, other), self, other)

    lowers(*overloads)(lowering)


_extreme(jnp.maximum, aten.maximum.default)
_extreme(jnp.minimum, aten.minimum.default)
_extreme(jnp.fmax, aten.fmax.default)
_extreme(jnp.fmin, aten.fmin.default)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(self: jax.Array, min: Operand | None = None, max: Operand | None = None) -> jax.Array:
    """NaN stays NaN; where min > max the result is max."""
    dtype = result_dtype(self, min, max)
    out = cast(self, dtype)
    if min is not None:
        out = jnp.maximum(out, cast(min, dtype))
    if max is not None:
        out = jnp.minimum(out, cast(max, dtype))
    return out


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(self: jax.Array, min: Operand) -> jax.Array:
    return clamp(self, min, None)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(self: jax.Array, max: Operand) -> jax.Array:
    return clamp(self, None, max)


# --- comparisons, logic, bits --------------------------------------------------------------------------------------------------


def _comparison(function: Callable[[Any, Any], Any], *overloads: OpOverload) -> None:
    def lowering(self: Operand, other: Operand) -> jax.Array:
        dtype = result_dtype(self, other)
        return function(cast(self, dtype), cast(other, dtype))

    lowers(*overloads)(lowering)


_comparison(lambda a, b: a == b, aten.eq.Tensor, aten.eq.Scalar)
_comparison(lambda a, b: a != b, aten.ne.Tensor, aten.ne.Scalar)
_comparison(lambda a, b: a < b, aten.lt.Tensor, aten.lt.Scalar)
_comparison(lambda a, b: a <= b, aten.le.Tensor, aten.le.Scalar)
_comparison(lambda a, b: a > b, aten.gt.Tensor, aten.gt.Scalar)
_comparison(lambda a, b: a >= b, aten.ge.Tensor, aten.ge.Scalar)


def _logical(function: Callable[[jax.Array, jax.Array], Any], overload: OpOverload) -> None:
    def lowering(self: jax.Array, other: jax.Array) -> jax.Array:
        return function(cast(self, BOOL), cast(other, BOOL))

    lowers(overload)(lowering)


_logical(jnp.logical_and, aten.logical_and.default)
_logical(jnp.logical_or, aten.logical_or.default)
_logical(jnp.logical_xor, aten.logical_xor.default)


@lowers(aten.logical_not.default)
def logical_not(self: jax.Array) -> jax.Array:
    return ~cast(self, BOOL)


def _bitwise(function: Callable[[jax.Array, jax.Array], Any], packet: Any) -> None:
    def lowering(self: Operand, other: Operand) -> jax.Array:
        return compute(function, result_dtype(self, other), self, other)

    lowers(packet.Tensor, packet.Scalar, packet.Scalar_Tensor)(lowering)


def _shift_left(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Torch gives 0 for a shift that is negative or not smaller than the width."""
    width = x.dtype.itemsize * 8
    return jnp.where((bits >= 0) & (bits < width), jnp.left_shift(x, jnp.clip(bits, 0, width - 1)), jnp.zeros_like(x))


def _shift_right(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Torch keeps only the sign for a shift that is negative or not smaller than the width."""
    last = x.dtype.itemsize * 8 - (1 if jnp.issubdtype(x.dtype, jnp.signedinteger) else 0)
    shifted = jnp.right_shift(x, jnp.where((bits < 0) | (bits > last), last, bits).astype(x.dtype))
    if last == x.dtype.itemsize * 8:
        return jnp.where((bits < 0) | (bits >= last), jnp.zeros_like(x), shifted)
    return shifted


_bitwise(jnp.bitwise_and, aten.bitwise_and)
_bitwise(jnp.bitwise_or, aten.bitwise_or)
_bitwise(jnp.bitwise_xor, aten.bitwise_xor)


def _shift(function: Callable[[jax.Array, jax.Array], Any], *overloads: OpOverload) -> None:
    def lowering(self: Operand, other: Operand) -> jax.Array:
        return compute(lambda a, b: function(*jnp.broadcast_arrays(a, b)), result_dtype(self, other), self, other)

    lowers(*overloads)(lowering)


_shift(
    _shift_left,
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_left_shift.Scalar_Tensor,
    aten.__lshift__.Tensor,
    aten.__lshift__.Scalar,
)
_shift(
    _shift_right,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Scalar_Tensor,
    aten.__rshift__.Tensor,
    aten.__rshift__.Scalar,
)


@lowers(aten.bitwise_not.default)
def bitwise_not(self: jax.Array) -> jax.Array:
    return ~self


# --- choosing ------------------------------------------------------------------------------------------------------------------


@lowers(aten.where.self)
def where(condition: jax.Array, self: Operand, other: Operand) -> jax.Array:
    dtype = result_dtype(self, other)
    return jnp.where(cast(condition, BOOL), cast(self, dtype), cast(other, dtype))
