"""Pairwise distances and their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .table import lowers

aten = torch.ops.aten


def _distance(difference: jax.Array, p: float) -> jax.Array:
    size = jnp.abs(difference)
    if p == 0:
        return (difference != 0).astype(difference.dtype).sum(-1)
    if p == 1:
        return size.sum(-1)
    if p == 2:
        return jnp.sqrt(jnp.square(difference).sum(-1))
    if np.isinf(p):
        return size.max(-1, initial=0)
    return (size ** jnp.asarray(p, size.dtype)).sum(-1) ** jnp.asarray(1 / p, size.dtype)


def _gradient(grad: jax.Array, difference: jax.Array, distance: jax.Array, p: float) -> jax.Array:
    """The gradient of `_distance` by `difference`; 0 where the distance is 0."""
    size, sign = jnp.abs(difference), jnp.sign(difference)
    far = distance != 0
    safe = jnp.where(far, distance, jnp.ones_like(distance))
    if p == 0:
        return jnp.zeros_like(difference)
    if p == 1:
        return grad * sign
    if np.isinf(p):
        return grad * sign * (size == distance).astype(grad.dtype)
    if p == 2:
        return jnp.where(far, grad * difference / safe, 0)
    nonzero = jnp.where(size == 0, jnp.ones_like(size), size)
    power = jnp.asarray(p - 1, size.dtype)
    return jnp.where(far & (size != 0), grad * sign * (nonzero / safe) ** power, 0)


@lowers(aten._cdist_forward.default)
def _cdist_forward(x1: jax.Array, x2: jax.Array, p: float, compute_mode: int | None) -> jax.Array:
    return _distance(x1[..., :, None, :] - x2[..., None, :, :], p)


@lowers(aten._cdist_backward.default)
def _cdist_backward(grad: jax.Array, x1: jax.Array, x2: jax.Array, p: float, cdist: jax.Array) -> jax.Array:
    difference = x1[..., :, None, :] - x2[..., None, :, :]
    summed = _gradient(grad[..., None], difference, cdist[..., None], p).sum(-2)
    return _unbroadcast(summed, x1.shape)


def _unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the batch dims that `shape` does not have, or has with size 1."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1), keepdims=True)


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(count, 1)


@lowers(aten._pdist_forward.default)
def _pdist_forward(self: jax.Array, p: float = 2.0) -> jax.Array:
    first, second = _pairs(self.shape[0])
    return _distance(self[first] - self[second], p)


@lowers(aten._pdist_backward.default)
def _pdist_backward(grad: jax.Array, self: jax.Array, p: float, pdist: jax.Array) -> jax.Array:
    first, second = _pairs(self.shape[0])
    part = _gradient(grad[:, None], self[first] - self[second], pdist[:, None], p)
    return jnp.zeros_like(self).at[first].add(part).at[second].add(-part)
