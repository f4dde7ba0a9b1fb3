"""Padding of the last dims with a constant, a reflection or the edge; negative amounts cut off."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import Number, cast
from .table import lowers

aten = torch.ops.aten


def _amounts(padding: Sequence[int], ndim: int) -> list[tuple[int, int]]:
    """Torch lists (before, after) from the last dim backwards; here one pair per dim."""
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)]
    return [(0, 0)] * (ndim - len(pairs)) + pairs[::-1]


@lowers(aten.constant_pad_nd.default)
def constant_pad_nd(self: jax.Array, pad: Sequence[int], value: Number = 0) -> jax.Array:
    fill = jnp.asarray(cast(value, self.dtype))
    return lax.pad(self, fill, [(before, after, 0) for before, after in _amounts(pad, self.ndim)])


def _pad_by(mode: str, x: jax.Array, padding: Sequence[int]) -> jax.Array:
    amounts = _amounts(padding, x.ndim)
    # cut after padding: what is reflected or repeated is the whole array's, also where its edge is then cut off
    padded = jnp.pad(x, [(max(before, 0), max(after, 0)) for before, after in amounts], mode=mode)
    return padded[
        tuple(slice(max(-before, 0), length - max(-after, 0)) for (before, after), length in zip(amounts, padded.shape))
    ]


def _pad_backward(mode: str, grad_output: jax.Array, x: jax.Array, padding: Sequence[int]) -> jax.Array:
    transposed = jax.linear_transpose(
        lambda value: _pad_by(mode, value, padding), jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    grad: jax.Array = transposed(grad_output)[0]
    return grad


@lowers(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def reflection_pad(self: jax.Array, padding: Sequence[int]) -> jax.Array:
    return _pad_by("reflect", self, padding)


@lowers(
    aten.reflection_pad1d_backward.default,
    aten.reflection_pad2d_backward.default,
    aten.reflection_pad3d_backward.default,
)
def reflection_pad_backward(grad_output: jax.Array, self: jax.Array, padding: Sequence[int]) -> jax.Array:
    return _pad_backward("reflect", grad_output, self, padding)


@lowers(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def replication_pad(self: jax.Array, padding: Sequence[int]) -> jax.Array:
    return _pad_by("edge", self, padding)


@lowers(
    aten.replication_pad1d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
)
def replication_pad_backward(grad_output: jax.Array, self: jax.Array, padding: Sequence[int]) -> jax.Array:
    return _pad_backward("edge", grad_output, self, padding)
