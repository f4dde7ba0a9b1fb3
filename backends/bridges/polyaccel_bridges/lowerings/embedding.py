"""Table look-ups and their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

from .table import lowers

aten = torch.ops.aten


def _rows(indices: jax.Array, num_rows: int) -> jax.Array:
    # 64-bit index arithmetic is slow on accelerators, and no table has 2**31 rows.
    return indices.astype(jnp.int32) if num_rows < 2**31 else indices


@lowers(aten.embedding.default)
def embedding(
    weight: jax.Array,
    indices: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    return weight.at[_rows(indices, weight.shape[0])].get(mode="promise_in_bounds")


@lowers(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    grad_output: jax.Array, indices: jax.Array, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> jax.Array:
    rows = _rows(indices, num_weights)
    # Masking the gradients, not the padding row of the result: writing to one row of a row-sharded table would zero that
    # row of every shard.
    grad = jnp.where((rows != padding_idx)[..., None], grad_output, 0) if padding_idx >= 0 else grad_output
    sums = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))  # many 16-bit summands would lose digits
    if scale_grad_by_freq:
        counts = jnp.zeros(num_weights, sums.dtype).at[rows].add(1)
        sums = sums / counts[rows][..., None]
    table = jnp.zeros((num_weights, grad.shape[-1]), sums.dtype).at[rows].add(sums, mode="promise_in_bounds")
    return table.astype(grad_output.dtype)


@lowers(aten.embedding_renorm.default)
def embedding_renorm(self: jax.Array, indices: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    """Rows that `indices` name and that are longer than `max_norm` are shortened to it, with torch's epsilon of 1e-7."""
    wide = self.astype(jnp.promote_types(self.dtype, jnp.float32))
    norms = jnp.linalg.norm(wide, ord=norm_type, axis=1)
    named = jnp.zeros(self.shape[0], jnp.bool_).at[_rows(indices, self.shape[0]).reshape(-1)].set(True)
    scale = jnp.where(named & (norms > max_norm), max_norm / (norms + 1e-7), jnp.ones_like(norms))
    return (wide * scale[:, None]).astype(self.dtype)
