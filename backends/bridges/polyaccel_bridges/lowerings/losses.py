"""Losses that ATen has as one operation, with their backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import INT32, Number, cast, compute, opmath, result_dtype
from .table import lowers

aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # ATen's numbers for the reduction; 2 is the sum


def _reduce(values: jax.Array, reduction: int) -> jax.Array:
    """Accumulated in the wider dtype, rounded once."""
    if reduction == _NONE:
        return values
    wide = opmath(values.dtype)
    total = jnp.sum(values.astype(wide))
    return (total / cast(values.size, wide) if reduction == _MEAN else total).astype(values.dtype)


def _scale(reduction: int, size: int) -> float:
    return 1.0 / size if reduction == _MEAN and size else 1.0


# --- negative log likelihood ---------------------------------------------------------------------------------------------------


def _class_axis(ndim: int) -> int:
    """(classes,), (batch, classes) or (batch, classes, height, width)."""
    return 0 if ndim == 1 else 1


def _target_weight(x: jax.Array, target: jax.Array, weight: jax.Array | None, ignore_index: int) -> jax.Array:
    """The weight of every target, zero where it is ignored."""
    kept = target != ignore_index
    if weight is None:
        return kept.astype(x.dtype)
    chosen = jnp.take(weight, jnp.where(kept, target, 0).astype(INT32), mode="clip")
    return jnp.where(kept, chosen, jnp.zeros_like(chosen))


@lowers(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll_loss_forward(
    self: jax.Array, target: jax.Array, weight: jax.Array | None, reduction: int, ignore_index: int
) -> tuple[jax.Array, jax.Array]:
    """Loss and total weight; one element per target is gathered, no one-hot array is made."""
    axis = _class_axis(self.ndim)
    weights = _target_weight(self, target, weight, ignore_index)
    index = jnp.expand_dims(jnp.where(target == ignore_index, 0, target).astype(INT32), axis)
    picked = jnp.squeeze(jnp.take_along_axis(self, index, axis=axis, mode="clip"), axis)
    # an ignored -inf times zero would be NaN
    losses = jnp.where(target == ignore_index, jnp.zeros_like(picked), -picked * weights)
    if reduction == _NONE and self.ndim != 1:
        return losses, jnp.zeros((), self.dtype)
    wide = opmath(self.dtype)
    total_weight = jnp.sum(weights.astype(wide))
    total = jnp.sum(losses.astype(wide))
    if reduction == _MEAN:
        total = total / total_weight
    return total.astype(self.dtype), total_weight.astype(self.dtype)


@lowers(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def nll_loss_backward(
    grad_output: jax.Array,
    self: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    reduction: int,
    ignore_index: int,
    total_weight: jax.Array,
) -> jax.Array:
    """-weight * gradient at each target, zero elsewhere: a comparison with the class numbers, which fuses with what follows."""
    axis = _class_axis(self.ndim)
    weights = _target_weight(self, target, weight, ignore_index)
    grad = grad_output / total_weight if reduction == _MEAN else grad_output
    line = jnp.expand_dims(jnp.where(target == ignore_index, jnp.zeros_like(weights), -weights * grad), axis)
    here = lax.broadcasted_iota(INT32, self.shape, axis) == jnp.expand_dims(target.astype(INT32), axis)
    return jnp.where(here, line, jnp.zeros((), line.dtype)).astype(self.dtype)


# --- distances between prediction and target -----------------------------------------------------------------------------------


def _pointwise(values: Callable[..., Any], *operands: jax.Array, reduction: int) -> jax.Array:
    return _reduce(compute(values, result_dtype(*operands), *operands), reduction)


@lowers(aten.mse_loss.default)
def mse_loss(self: jax.Array, target: jax.Array, reduction: int = _MEAN) -> jax.Array:
    return _pointwise(lambda x, y: (x - y) * (x - y), self, target, reduction=reduction)


@lowers(aten.mse_loss_backward.default)
def mse_loss_backward(grad_output: jax.Array, self: jax.Array, target: jax.Array, reduction: int) -> jax.Array:
    scale = 2.0 * _scale(reduction, self.size)
    return compute(lambda g, x, y: scale * (x - y) * g, result_dtype(self, target), grad_output, self, target)


def _smooth_l1(difference: jax.Array, beta: float) -> jax.Array:
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta) if beta else size


@lowers(aten.smooth_l1_loss.default)
def smooth_l1_loss(self: jax.Array, target: jax.Array, reduction: int = _MEAN, beta: float = 1.0) -> jax.Array:
    return _pointwise(lambda x, y: _smooth_l1(x - y, beta), self, target, reduction=reduction)


@lowers(aten.smooth_l1_loss_backward.default)
def smooth_l1_loss_backward(
    grad_output: jax.Array, self: jax.Array, target: jax.Array, reduction: int, beta: float
) -> jax.Array:
    scale = _scale(reduction, self.size)

    def backward(g: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        slope = jnp.clip((x - y) / beta, -1, 1) if beta else jnp.sign(x - y)
        return slope * g * scale

    return compute(backward, result_dtype(self, target), grad_output, self, target)


@lowers(aten.huber_loss.default)
def huber_loss(self: jax.Array, target: jax.Array, reduction: int = _MEAN, delta: float = 1.0) -> jax.Array:
    return _pointwise(lambda x, y: _smooth_l1(x - y, delta) * delta, self, target, reduction=reduction)


@lowers(aten.huber_loss_backward.default)
def huber_loss_backward(
    grad_output: jax.Array, self: jax.Array, target: jax.Array, reduction: int, delta: float
) -> jax.Array:
    scale = _scale(reduction, self.size)
    return compute(
        lambda g, x, y: jnp.clip(x - y, -delta, delta) * g * scale,
        result_dtype(self, target),
        grad_output,
        self,
        target,
    )


@lowers(aten.binary_cross_entropy.default)
def binary_cross_entropy(
    self: jax.Array, target: jax.Array, weight: jax.Array | None = None, reduction: int = _MEAN
) -> jax.Array:
    def values(x: jax.Array, y: jax.Array) -> jax.Array:
        # torch bounds both logarithms at -100, so that 0 and 1 give finite losses
        return (y - 1) * jnp.maximum(jnp.log1p(-x), -100) - y * jnp.maximum(jnp.log(x), -100)

    losses = compute(values, result_dtype(self, target), self, target)
    return _reduce(losses if weight is None else losses * weight, reduction)


@lowers(aten.binary_cross_entropy_backward.default)
def binary_cross_entropy_backward(
    grad_output: jax.Array,
    self: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    reduction: int = _MEAN,
) -> jax.Array:
    scale = _scale(reduction, self.size)

    def backward(g: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return g * scale * (x - y) / jnp.maximum((1 - x) * x, 1e-12)

    grad = compute(backward, result_dtype(self, target), grad_output, self, target)
    return grad if weight is None else grad * weight


@lowers(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(
    self: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    pos_weight: jax.Array | None = None,
    reduction: int = _MEAN,
) -> jax.Array:
    log_sigmoid = compute(lambda x: jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x))), self.dtype, self)
    log_weight = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    losses = (1 - target) * self - log_weight * log_sigmoid
    return _reduce(losses if weight is None else losses * weight, reduction)


@lowers(aten.soft_margin_loss.default)
def soft_margin_loss(self: jax.Array, target: jax.Array, reduction: int = _MEAN) -> jax.Array:
    return _pointwise(lambda x, y: jnp.log1p(jnp.exp(-y * x)), self, target, reduction=reduction)


@lowers(aten.soft_margin_loss_backward.default)
def soft_margin_loss_backward(grad_output: jax.Array, self: jax.Array, target: jax.Array, reduction: int) -> jax.Array:
    scale = _scale(reduction, self.size)
    return compute(
        lambda g, x, y: -y * lax.logistic(-y * x) * g * scale, result_dtype(self, target), grad_output, self, target
    )


# --- margins -------------------------------------------------------------------------------------------------------------------


@lowers(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    grad_output: jax.Array,
    self: jax.Array,
    target: jax.Array,
    p: Number,
    margin: Number,
    weight: jax.Array | None = None,
    reduction: int = _MEAN,
) -> jax.Array:
    lines = self.reshape(-1, self.shape[-1]) if self.ndim else self.reshape(1, 1)
    classes = lines.shape[-1]
    wanted = target.reshape(-1, 1).astype(INT32)
    z = cast(margin, lines.dtype) - jnp.take_along_axis(lines, wanted, axis=1) + lines
    slope = jnp.where(z > 0, jnp.ones_like(z) if p == 1 else 2 * z, jnp.zeros_like(z)) / classes
    if weight is not None:
        slope = slope * weight[wanted]
    here = lax.broadcasted_iota(INT32, lines.shape, 1) == wanted
    slope = jnp.where(here, jnp.zeros_like(slope), slope)
    slope = jnp.where(here, -jnp.sum(slope, axis=1, keepdims=True), slope)
    grad = grad_output.reshape(-1, 1) if reduction == _NONE else grad_output
    return (slope * grad * _scale(reduction, lines.shape[0])).astype(self.dtype).reshape(self.shape)


@lowers(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(
    grad_output: jax.Array, self: jax.Array, target: jax.Array, reduction: int, is_target: jax.Array
) -> jax.Array:
    """Every target against every other class; the list of targets ends at the first -1."""
    lines = self.reshape(-1, self.shape[-1]) if self.ndim else self.reshape(1, 1)
    classes = lines.shape[-1]
    targets = target.reshape(lines.shape).astype(INT32)
    listed = jnp.cumprod((targets >= 0).astype(INT32), axis=1) > 0  # (batch, position)
    targets = jnp.where(listed, targets, 0)
    others = is_target.reshape(lines.shape) == 0  # (batch, class)
    z = 1 - jnp.take_along_axis(lines, targets, axis=1)[:, :, None] + lines[:, None, :]  # (batch, position, class)
    active = ((z > 0) & listed[:, :, None] & others[:, None, :]).astype(lines.dtype) / classes
    to_others = jnp.sum(active, axis=1)
    here = (lax.broadcasted_iota(INT32, z.shape, 2) == targets[:, :, None]) & listed[:, :, None]
    to_targets = jnp.sum(jnp.where(here, jnp.sum(active, axis=2, keepdims=True), 0), axis=1)
    grad = grad_output.reshape(-1, 1) if reduction == _NONE else grad_output
    out = (to_others - to_targets) * grad * _scale(reduction, lines.shape[0])
    return out.astype(self.dtype).reshape(self.shape)
