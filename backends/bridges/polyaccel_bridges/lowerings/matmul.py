"""Matrix products. 32-bit products are 32-bit products: accelerators would silently compute them in TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .table import lowers

aten = torch.ops.aten


def precision_of(array: jax.Array) -> lax.Precision:
    """Full precision for 32 and 64-bit products; the hardware's own for 16-bit ones, which loses nothing."""
    return lax.Precision.DEFAULT if array.dtype.itemsize <= 2 else lax.Precision.HIGHEST


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in the dtype of the operands."""
    return jnp.matmul(a, b, precision=precision_of(a))


def _combine(bias: jax.Array, values: jax.Array, beta: complex, alpha: complex) -> jax.Array:
    # beta == 0 ignores `bias` even where it is NaN, as torch documents.
    if alpha != 1:
        values = values * jnp.asarray(alpha, values.dtype)
    if beta == 0:
        return values
    if beta != 1:
        bias = bias * jnp.asarray(beta, bias.dtype)
    return values + bias


@lowers(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def mm(self: jax.Array, mat2: jax.Array) -> jax.Array:
    return product(self, mat2)


@lowers(aten.mm.dtype, aten.bmm.dtype)
def mm_dtype(self: jax.Array, mat2: jax.Array, out_dtype: np.dtype) -> jax.Array:
    return jnp.matmul(self, mat2, precision=precision_of(self), preferred_element_type=out_dtype)


@lowers(aten.vdot.default)
def vdot(self: jax.Array, other: jax.Array) -> jax.Array:
    return product(jnp.conj(self), other)


@lowers(aten.addmm.default, aten.addmv.default)
def addmm(self: jax.Array, mat1: jax.Array, mat2: jax.Array, *, beta: complex = 1, alpha: complex = 1) -> jax.Array:
    return _combine(self, product(mat1, mat2), beta, alpha)


def _wide(dtype: Any) -> Any:
    """Where scaled sums meet, PyTorch rounds 16-bit results once, at the end."""
    return jnp.promote_types(dtype, np.float32) if jnp.issubdtype(dtype, np.inexact) else dtype


@lowers(aten.baddbmm.default)
def baddbmm(
    self: jax.Array, batch1: jax.Array, batch2: jax.Array, *, beta: complex = 1, alpha: complex = 1
) -> jax.Array:
    wide = _wide(batch1.dtype)
    total = jnp.matmul(batch1, batch2, precision=precision_of(batch1), preferred_element_type=wide)
    return _combine(self.astype(wide), total, beta, alpha).astype(batch1.dtype)


@lowers(aten.addbmm.default)
def addbmm(
    self: jax.Array, batch1: jax.Array, batch2: jax.Array, *, beta: complex = 1, alpha: complex = 1
) -> jax.Array:
    total = jnp.einsum(
        "bij,bjk->ik", batch1, batch2, precision=precision_of(batch1), preferred_element_type=_wide(batch1.dtype)
    )
    return _combine(self.astype(total.dtype), total, beta, alpha).astype(batch1.dtype)


@lowers(aten.addr.default)
def addr(self: jax.Array, vec1: jax.Array, vec2: jax.Array, *, beta: complex = 1, alpha: complex = 1) -> jax.Array:
    wide = _wide(vec1.dtype)
    total = jnp.outer(vec1.astype(wide), vec2.astype(wide))
    return _combine(self.astype(wide), total, beta, alpha).astype(vec1.dtype)


@lowers(aten._trilinear.default)
def _trilinear(
    i1: jax.Array,
    i2: jax.Array,
    i3: jax.Array,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> jax.Array:
    """The product of three arrays that lack the dims in `expand*`, summed over `sumdim` (what nn.Bilinear computes)."""
    ndim = i1.ndim + len(expand1)
    letters = "abcdefghijklmnopqrstuvwxyz"[:ndim]
    terms = ["".join(c for d, c in enumerate(letters) if d not in absent) for absent in (expand1, expand2, expand3)]
    result = "".join(c for d, c in enumerate(letters) if d not in sumdim)
    out = jnp.einsum(f"{','.join(terms)}->{result}", i1, i2, i3, precision=precision_of(i1), optimize="optimal")
    missing = [d for d, c in enumerate(letters) if d not in sumdim and not any(c in term for term in terms)]
    assert not missing
    return out
