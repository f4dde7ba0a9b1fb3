"""Activation functions and their backwards; narrow floats are computed in float32 and rounded once, as torch's kernels do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import Number, cast, compute, float_dtype, result_dtype
from .table import lowers

aten = torch.ops.aten


def _in_own_dtype(function: Callable[..., Any], *operands: jax.Array) -> jax.Array:
    return compute(function, result_dtype(*operands), *operands)


@lowers(aten.relu.default)
def relu(self: jax.Array) -> jax.Array:
    return jnp.maximum(self, cast(0, self.dtype))


@lowers(aten.threshold.default)
def threshold(self: jax.Array, threshold: Number, value: Number) -> jax.Array:
    return jnp.where(self <= cast(threshold, self.dtype), cast(value, self.dtype), self)


@lowers(aten.threshold_backward.default)
def threshold_backward(grad_output: jax.Array, self: jax.Array, threshold: Number) -> jax.Array:
    dtype = result_dtype(grad_output, self)
    return jnp.where(self <= cast(threshold, self.dtype), cast(0, dtype), cast(grad_output, dtype))


@lowers(aten.hardtanh.default)
def hardtanh(self: jax.Array, min_val: Number = -1, max_val: Number = 1) -> jax.Array:
    return jnp.minimum(jnp.maximum(self, cast(min_val, self.dtype)), cast(max_val, self.dtype))


@lowers(aten.hardtanh_backward.default)
def hardtanh_backward(grad_output: jax.Array, self: jax.Array, min_val: Number, max_val: Number) -> jax.Array:
    outside = (self <= cast(min_val, self.dtype)) | (self >= cast(max_val, self.dtype))
    return jnp.where(outside, jnp.zeros_like(grad_output), grad_output)


@lowers(aten.leaky_relu.default)
def leaky_relu(self: jax.Array, negative_slope: Number = 0.01) -> jax.Array:
    return _in_own_dtype(lambda x: jnp.where(x > 0, x, x * negative_slope), self)


@lowers(aten.leaky_relu_backward.default)
def leaky_relu_backward(
    grad_output: jax.Array, self: jax.Array, negative_slope: Number, self_is_result: bool
) -> jax.Array:
    return _in_own_dtype(lambda g, x: jnp.where(x > 0, g, g * negative_slope), grad_output, self)


@lowers(aten._prelu_kernel.default)
def prelu(self: jax.Array, weight: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda x, w: jnp.where(x > 0, x, w * x), self, weight)


@lowers(aten._prelu_kernel_backward.default)
def prelu_backward(grad_output: jax.Array, self: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        _in_own_dtype(lambda g, x, w: jnp.where(x > 0, g, w * g), grad_output, self, weight),
        _in_own_dtype(lambda g, x: jnp.where(x > 0, 0, x * g), grad_output, self),
    )


@lowers(aten.elu.default)
def elu(self: jax.Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> jax.Array:
    return _in_own_dtype(
        lambda x: jnp.where(x > 0, x * scale, jnp.expm1(jnp.minimum(x, 0) * input_scale) * (alpha * scale)), self
    )


@lowers(aten.elu_backward.default)
def elu_backward(
    grad_output: jax.Array, alpha: float, scale: float, input_scale: float, is_result: bool, self_or_result: jax.Array
) -> jax.Array:
    negative = alpha * scale

    def backward(g: jax.Array, x: jax.Array) -> jax.Array:
        if is_result:
            return jnp.where(x <= 0, g * input_scale * (x + negative), g * scale)
        return jnp.where(x <= 0, g * input_scale * negative * jnp.exp(jnp.minimum(x, 0) * input_scale), g * scale)

    return _in_own_dtype(backward, grad_output, self_or_result)


@lowers(aten.celu.default)
def celu(self: jax.Array, alpha: float = 1.0) -> jax.Array:
    return elu(self, alpha, 1.0, 1.0 / alpha)


_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_KAPPA = 0.044715


@lowers(aten.gelu.default)
def gelu(self: jax.Array, *, approximate: str = "none") -> jax.Array:
    if approximate == "tanh":
        return _in_own_dtype(lambda x: 0.5 * x * (1 + jnp.tanh(_SQRT_2_OVER_PI * (x + _KAPPA * x * x * x))), self)
    return _in_own_dtype(lambda x: 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5))), self)


@lowers(aten.gelu_backward.default)
def gelu_backward(grad_output: jax.Array, self: jax.Array, *, approximate: str = "none") -> jax.Array:
    def by_tanh(g: jax.Array, x: jax.Array) -> jax.Array:
        tanh = jnp.tanh(_SQRT_2_OVER_PI * (x + _KAPPA * x * x * x))
        slope = _SQRT_2_OVER_PI * (1 + 3 * _KAPPA * x * x)
        return g * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope)

    def by_erf(g: jax.Array, x: jax.Array) -> jax.Array:
        cdf = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
        return g * (cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))

    return _in_own_dtype(by_tanh if approximate == "tanh" else by_erf, grad_output, self)


@lowers(aten.silu.default)
def silu(self: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda x: x * lax.logistic(x), self)


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@lowers(aten.mish.default)
def mish(self: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda x: x * jnp.tanh(_softplus(x)), self)


@lowers(aten.softplus.default)
def softplus(self: jax.Array, beta: float = 1, threshold: float = 20) -> jax.Array:
    return _in_own_dtype(lambda x: jnp.where(x * beta > threshold, x, jnp.log1p(jnp.exp(x * beta)) / beta), self)


@lowers(aten.softplus_backward.default)
def softplus_backward(grad_output: jax.Array, self: jax.Array, beta: float, threshold: float) -> jax.Array:
    return _in_own_dtype(lambda g, x: jnp.where(x * beta > threshold, g, g * lax.logistic(x * beta)), grad_output, self)


@lowers(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(self: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second result is torch's CPU buffer exp(-|x|), which its backward reads."""
    out = _in_own_dtype(lambda x: jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x))), self)
    return out, _in_own_dtype(lambda x: jnp.exp(-jnp.abs(x)), self)


@lowers(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(grad_output: jax.Array, self: jax.Array, buffer: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda g, x: g * lax.logistic(-x), grad_output, self)


@lowers(aten.sigmoid_backward.default)
def sigmoid_backward(grad_output: jax.Array, output: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda g, y: g * (1 - y) * y, grad_output, output)


@lowers(aten.tanh_backward.default)
def tanh_backward(grad_output: jax.Array, output: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda g, y: g * (1 - y * y), grad_output, output)


@lowers(aten.hardsigmoid.default)
def hardsigmoid(self: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda x: jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6, self)


@lowers(aten.hardsigmoid_backward.default)
def hardsigmoid_backward(grad_output: jax.Array, self: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda g, x: jnp.where((x > -3) & (x < 3), g / 6, jnp.zeros_like(g)), grad_output, self)


@lowers(aten.hardswish.default)
def hardswish(self: jax.Array) -> jax.Array:
    return _in_own_dtype(lambda x: x * jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6, self)


@lowers(aten.hardswish_backward.default)
def hardswish_backward(grad_output: jax.Array, self: jax.Array) -> jax.Array:
    def backward(g: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(x <= -3, jnp.zeros_like(g), jnp.where(x < 3, g * (x / 3 + 0.5), g))

    return _in_own_dtype(backward, grad_output, self)


@lowers(aten.hardshrink.default)
def hardshrink(self: jax.Array, lambd: Number = 0.5) -> jax.Array:
    limit = cast(lambd, self.dtype)
    return jnp.where((self >= -limit) & (self <= limit), jnp.zeros_like(self), self)


@lowers(aten.hardshrink_backward.default)
def hardshrink_backward(grad_out: jax.Array, self: jax.Array, lambd: Number) -> jax.Array:
    limit = cast(lambd, self.dtype)
    return jnp.where((self >= -limit) & (self <= limit), jnp.zeros_like(grad_out), grad_out)


@lowers(aten.softshrink.default)
def softshrink(self: jax.Array, lambd: Number = 0.5) -> jax.Array:
    return _in_own_dtype(
        # x * 0 keeps NaN inside the band, as torch does
        lambda x: jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, x * 0)),
        self,
    )


@lowers(aten.softshrink_backward.default)
def softshrink_backward(grad_output: jax.Array, self: jax.Array, lambd: Number) -> jax.Array:
    limit = cast(lambd, self.dtype)
    return jnp.where((self >= -limit) & (self <= limit), jnp.zeros_like(grad_output), grad_output)


@lowers(aten.glu.default)
def glu(self: jax.Array, dim: int = -1) -> jax.Array:
    value, gate = jnp.split(self, 2, axis=dim)
    return _in_own_dtype(lambda v, g: v * lax.logistic(g), value, gate)


@lowers(aten.glu_backward.default)
def glu_backward(grad_output: jax.Array, self: jax.Array, dim: int) -> jax.Array:
    value, gate = jnp.split(self, 2, axis=dim)
    to_value = _in_own_dtype(lambda d, g: d * lax.logistic(g), grad_output, gate)
    to_gate = _in_own_dtype(lambda d, v, g: d * v * lax.logistic(g) * (1 - lax.logistic(g)), grad_output, value, gate)
    return jnp.concatenate([to_value, to_gate], axis=dim)


@lowers(aten.logit.default)
def logit(self: jax.Array, eps: float | None = None) -> jax.Array:
    def forward(x: jax.Array) -> jax.Array:
        x = x if eps is None else jnp.clip(x, eps, 1 - eps)
        return jnp.log(x / (1 - x))

    return compute(forward, float_dtype(self), self)


@lowers(aten.logit_backward.default)
def logit_backward(grad_output: jax.Array, self: jax.Array, eps: float | None = None) -> jax.Array:
    def backward(g: jax.Array, x: jax.Array) -> jax.Array:
        low, high = (0.0, 1.0) if eps is None else (eps, 1 - eps)
        outside = jnp.nan if eps is None else 0.0
        return jnp.where((x >= low) & (x <= high), g / (x * (1 - x)), outside)

    return _in_own_dtype(backward, grad_output, self)


@lowers(aten.rrelu_with_noise_backward.default)
def rrelu_with_noise_backward(
    grad_output: jax.Array,
    self: jax.Array,
    noise: jax.Array,
    lower: float,
    upper: float,
    training: bool,
    self_is_result: bool,
) -> jax.Array:
    if training and upper - lower > 1e-6:
        return grad_output * noise
    return leaky_relu_backward(grad_output, self, (lower + upper) / 2, self_is_result)
