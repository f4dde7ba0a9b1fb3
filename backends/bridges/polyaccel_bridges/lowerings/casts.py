"""Casts, copies and operations that only torch's storage cares about (alias, detach, clone, lift)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import BOOL, INT64, UINT8, DType, cast, is_complex, is_integral, real_dtype
from .table import lowers

aten = torch.ops.aten


def convert(x: jax.Array, dtype: DType) -> jax.Array:
    """A cast with torch's meaning: floats truncate towards zero, and a negative float wraps into an unsigned integer."""
    if dtype.kind == "u" and not is_integral(x.dtype):
        return cast(x, INT64).astype(dtype)
    return cast(x, dtype)


@lowers(
    aten.alias.default,
    aten.alias_copy.default,
    aten.detach.default,
    aten.detach_copy.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
)
def same_value(self: jax.Array) -> jax.Array:
    return self


@lowers(aten._to_copy.default)
def to_copy(self: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    return self if dtype is None else convert(self, dtype)


@lowers(aten._assert_tensor_metadata.default)
def assert_tensor_metadata(a: Any, size: Any = None, stride: Any = None, dtype: Any = None) -> None:
    """Checked by torch while it captured; shapes and dtypes cannot change afterwards."""


@lowers(aten.copy.default)
def copy(self: jax.Array, src: jax.Array) -> jax.Array:
    return jnp.broadcast_to(convert(src, self.dtype), self.shape)


@lowers(aten.view.dtype, aten.view_copy.dtype)
def view_dtype(self: jax.Array, dtype: DType) -> jax.Array:
    """The same bytes under another dtype; a different width splits or joins the last dim."""
    old, new = self.dtype.itemsize, dtype.itemsize
    shape = self.shape if old == new else (*self.shape[:-1], self.shape[-1] * old // new)
    if is_complex(self.dtype):
        self = view_as_real(self)
    elif self.dtype == BOOL:
        self = self.astype(UINT8)
    word = UINT8 if dtype == BOOL else real_dtype(dtype)  # XLA reinterprets neither bool nor complex
    count = word.itemsize // self.dtype.itemsize
    words = lax.bitcast_convert_type(self.reshape(-1, count) if count > 1 else self, word)
    if dtype == BOOL:
        return (words != 0).reshape(shape)
    return view_as_complex(words.reshape(*shape, 2)) if is_complex(dtype) else words.reshape(shape)


@lowers(aten.view_as_real.default, aten.view_as_real_copy.default)
def view_as_real(self: jax.Array) -> jax.Array:
    return jnp.stack([jnp.real(self), jnp.imag(self)], axis=-1)


@lowers(aten.view_as_complex.default, aten.view_as_complex_copy.default)
def view_as_complex(self: jax.Array) -> jax.Array:
    return lax.complex(self[..., 0], self[..., 1])


@lowers(aten.complex.default)
def make_complex(real: jax.Array, imag: jax.Array) -> jax.Array:
    real, imag = jnp.broadcast_arrays(real, imag)
    return lax.complex(real, imag)


@lowers(aten.polar.default)
def polar(abs: jax.Array, angle: jax.Array) -> jax.Array:
    return make_complex(abs * jnp.cos(angle), abs * jnp.sin(angle))


@lowers(aten._conj.default, aten._conj_copy.default, aten._conj_physical.default)
def conj(self: jax.Array) -> jax.Array:
    return jnp.conj(self) if is_complex(self.dtype) else self


@lowers(aten._neg_view.default, aten._neg_view_copy.default)
def neg_view(self: jax.Array) -> jax.Array:
    return -self
