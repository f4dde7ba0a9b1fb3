"""Batch, layer and group normalization of 32 and 64-bit arrays; the capture widens narrower ones (`decompositions.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .table import lowers

aten = torch.ops.aten


def _moments(x: jax.Array, dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over `dims`, kept; two passes, because E[x^2] - E[x]^2 cancels."""
    mean = x.mean(dims, keepdims=True)
    return mean, jnp.square(x - mean).mean(dims, keepdims=True)


def _per_channel(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape(1, -1, *[1] * (ndim - 2))


def _scaled(normal: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if weight is not None:
        normal = normal * weight.astype(normal.dtype)
    return normal if bias is None else normal + bias.astype(normal.dtype)


def _trained(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    mean, variance = _moments(x, (0, *range(2, x.ndim)))
    rstd = lax.rsqrt(variance + jnp.asarray(eps, x.dtype))
    scale, shift = (None if v is None else _per_channel(v, x.ndim) for v in (weight, bias))
    out = _scaled((x - mean) * rstd, scale, shift)
    return out, mean.reshape(-1), rstd.reshape(-1), variance.reshape(-1)


def _evaluated(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    eps: float,
) -> jax.Array:
    mean = _per_channel(running_mean, x.ndim).astype(x.dtype)
    rstd = lax.rsqrt(_per_channel(running_var, x.ndim).astype(x.dtype) + jnp.asarray(eps, x.dtype))
    scale, shift = (None if v is None else _per_channel(v, x.ndim) for v in (weight, bias))
    return _scaled((x - mean) * rstd, scale, shift)


def _moved(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    new = new.astype(old.dtype)
    return old * jnp.asarray(1 - momentum, old.dtype) + new * jnp.asarray(momentum, old.dtype)


@lowers(aten._native_batch_norm_legit_functional.default)
def _native_batch_norm_legit_functional(
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, ...]:
    if not training:
        out = _evaluated(input, weight, bias, running_mean, running_var, eps)
        nothing = jnp.zeros((0,), input.dtype)
        return out, nothing, nothing, running_mean, running_var
    out, mean, rstd, variance = _trained(input, weight, bias, eps)
    count = input.size // input.shape[1]
    unbiased = variance * jnp.asarray(count / max(count - 1, 1), variance.dtype)
    return out, mean, rstd, _moved(running_mean, mean, momentum), _moved(running_var, unbiased, momentum)


@lowers(aten._native_batch_norm_legit.no_stats)
def _native_batch_norm_legit_no_stats(
    input: jax.Array, weight: jax.Array | None, bias: jax.Array | None, training: bool, momentum: float, eps: float
) -> tuple[jax.Array, ...]:
    return _trained(input, weight, bias, eps)[:3]


@lowers(aten._native_batch_norm_legit_no_training.default)
def _native_batch_norm_legit_no_training(
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, ...]:
    nothing = jnp.zeros((0,), input.dtype)
    return _evaluated(input, weight, bias, running_mean, running_var, eps), nothing, nothing


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, variance = _moments(input, tuple(range(input.ndim - len(normalized_shape), input.ndim)))
    rstd = lax.rsqrt(variance + jnp.asarray(eps, input.dtype))
    return _scaled((input - mean) * rstd, weight, bias), mean, rstd


@lowers(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    grad_out: jax.Array,
    input: jax.Array,
    normalized_shape: Sequence[int],
    mean: jax.Array,
    rstd: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    output_mask: Sequence[bool],
) -> tuple[jax.Array | None, ...]:
    num_outer = input.ndim - len(normalized_shape)
    outer, inner = tuple(range(num_outer)), tuple(range(num_outer, input.ndim))
    normal = (input - mean) * rstd
    grad_input = None
    if output_mask[0]:
        grad = grad_out if weight is None else grad_out * weight
        along = (grad * normal).mean(inner, keepdims=True)
        grad_input = rstd * (grad - grad.mean(inner, keepdims=True) - normal * along)
    grad_weight = (grad_out * normal).sum(outer) if output_mask[1] and weight is not None else None
    return grad_input, grad_weight, grad_out.sum(outer) if output_mask[2] and bias is not None else None


@lowers(aten.native_group_norm.default)
def native_group_norm(
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    groups = input.reshape(N, group, C // group * HxW)
    mean, variance = _moments(groups, (2,))
    rstd = lax.rsqrt(variance + jnp.asarray(eps, input.dtype))
    scale, shift = (None if v is None else _per_channel(v, input.ndim) for v in (weight, bias))
    normal = ((groups - mean) * rstd).reshape(input.shape)
    return _scaled(normal, scale, shift), mean.reshape(N, group), rstd.reshape(N, group)
