"""Grouped matrix products: each group of rows (the tokens of one expert) meets a matrix of its own, and the group sizes are values.

`offs` (groups,) holds where each group ends. Rows behind the last group give zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .matmul import precision_of, product
from .table import lowers, lowers_named

aten = torch.ops.aten

# (rows, m) x (rows, n) -> (groups, m, n): the rows of a group are what its product sums over.
_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _sizes(offs: jax.Array) -> jax.Array:
    return jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype)).astype(np.int32)


def _rows(rows: jax.Array, matrices: jax.Array, offs: jax.Array) -> jax.Array:
    """(rows, k) x (groups, k, n) -> (rows, n)."""
    return lax.ragged_dot(rows, matrices, _sizes(offs), precision=precision_of(rows))


def _outer(a: jax.Array, b: jax.Array, offs: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(a, b, _sizes(offs), _OUTER, precision=precision_of(a))


@lowers(aten._grouped_mm.default)
def _grouped_mm(
    self: jax.Array,
    mat2: jax.Array,
    offs: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: np.dtype | None = None,
) -> jax.Array:
    """The dim that `offs` cuts is the one that a 2-dimensional operand has and a 3-dimensional one has not."""
    if offs is None:
        result = product(self, mat2)
    elif self.ndim == 2 and mat2.ndim == 3:
        result = _rows(self, mat2, offs)
    elif self.ndim == 3:
        result = _rows(mat2.T, self.transpose(0, 2, 1), offs).T
    else:
        result = _outer(self.T, mat2, offs)
    if bias is not None:
        result = result + bias
    return result if out_dtype is None else result.astype(out_dtype)


# Operations that transformers defines, in place of loops over experts, for whoever captures its models.
@lowers_named("transformers.grouped_mm_fallback.default")
def grouped_mm_fallback(input: jax.Array, weight: jax.Array, offs: jax.Array) -> jax.Array:
    return _rows(input, weight, offs)


@lowers_named("transformers.grouped_mm_fallback_backward.default")
def grouped_mm_fallback_backward(
    input: jax.Array, weight: jax.Array, offs: jax.Array, grad_output: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _rows(grad_output, weight.transpose(0, 2, 1), offs), _outer(input, grad_output, offs)
