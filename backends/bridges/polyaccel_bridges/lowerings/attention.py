"""Scaled dot product attention, kept whole by the capture; long sequences are computed in blocks of queries.

Where jax has a kernel for it (library_attention.py) that one computes, with its own derivative. Elsewhere the backward is that of
FlashAttention (https://arxiv.org/abs/2205.14135): probabilities come back from the log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from ..shards import num_sequence_parts
from . import library_attention
from .matmul import precision_of
from .table import lowers

aten = torch.ops.aten

# Scores of one block of queries against all keys: 64 MB in float32 for 8 heads of one sample.
_MAX_BLOCK_SCORES = 2**21


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In at least 32 bits, without widening 16-bit operands first."""
    return jnp.einsum(
        equation, a, b, precision=precision_of(a), preferred_element_type=jnp.promote_types(a.dtype, np.float32)
    )


def _scores(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, is_causal: bool, scale: float, rows: jax.Array | None
) -> jax.Array:
    scores = _einsum("bhqd,bhkd->bhqk", query, key)
    scores = scores * jnp.asarray(scale, scores.dtype)
    if mask is not None:
        scores = scores + mask.astype(scores.dtype)
    if is_causal:
        if rows is None:
            rows = lax.broadcasted_iota(np.int32, scores.shape[-2:], 0)
        else:  # of a block of queries
            rows = lax.broadcast_in_dim(rows, scores.shape[-2:], (0,))
        columns = lax.broadcasted_iota(np.int32, scores.shape[-2:], 1)
        scores = jnp.where(rows >= columns, scores, -jnp.inf)
    return scores


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    scale: float,
    rows: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    scores = _scores(query, key, mask, is_causal, scale, rows)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)  # a row without any key: weights 0, not NaN
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = _einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)
    out = out / jnp.where(total == 0, jnp.ones_like(total), total)
    return out.astype(query.dtype), (jnp.log(total) + top)[..., 0]


def _block_size(length: int, keys: int) -> int:
    """The largest divisor of `length` whose scores fit a block; `length` itself where that is sensible."""
    if length * keys <= _MAX_BLOCK_SCORES:
        return length
    wanted = max(_MAX_BLOCK_SCORES // keys, 1)
    best = max(size for size in range(1, wanted + 1) if length % size == 0)
    return best if best >= min(wanted, 16) else length


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Queries in blocks of `size` rows from each of `parts` equal parts of the sequence, so that all devices have work in every block."""

    length: int
    size: int
    parts: int

    @classmethod
    def of(cls, length: int, keys: int) -> _Blocks:
        """The blocks of this many queries against this many keys."""
        parts = num_sequence_parts()
        parts = parts if length % parts == 0 else 1
        return cls(length, _block_size(length // parts, keys), parts)

    @property
    def is_one(self) -> bool:
        return self.size * self.parts == self.length

    def rows(self) -> jax.Array:
        """(blocks, rows of a block): the places of the queries in the sequence."""
        places = np.arange(self.length, dtype=np.int32).reshape(self.parts, -1, self.size)
        return jnp.asarray(places.swapaxes(0, 1).reshape(-1, self.parts * self.size))

    def cut(self, x: jax.Array) -> jax.Array:
        """(b, h, q, ...) -> (blocks, b, h, rows of a block, ...)"""
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.parts, -1, self.size, *x.shape[3:]), 3, 0)
        return x.reshape(*x.shape[:3], self.parts * self.size, *x.shape[5:])

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        x = jnp.moveaxis(x.reshape(*x.shape[:3], self.parts, self.size, *x.shape[4:]), 0, 3)
        return x.reshape(*x.shape[:2], self.length, *x.shape[5:])

    def cut_mask(self, mask: jax.Array | None) -> jax.Array | None:
        """A mask that may be the same for all queries."""
        if mask is None:
            return None
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        if mask.shape[2] == 1:
            return jnp.broadcast_to(mask, (self.length // (self.size * self.parts), *mask.shape))
        return self.cut(mask)


def _default_scale(query: jax.Array, scale: float | None) -> float:
    return 1 / float(np.sqrt(query.shape[-1])) if scale is None else scale


def _repeated(x: jax.Array, query: jax.Array) -> jax.Array:
    """Every key or value head once per query head that shares it (grouped-query attention)."""
    return x if x.shape[1] == query.shape[1] else jnp.repeat(x, query.shape[1] // x.shape[1], axis=1)


def _summed(grad: jax.Array, heads: int) -> jax.Array:
    if grad.shape[1] == heads:
        return grad
    return grad.reshape(grad.shape[0], heads, grad.shape[1] // heads, *grad.shape[2:]).sum(2)


def _is_for_library(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, is_causal: bool
) -> bool:
    chosen = library_attention.choose(
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        has_mask=mask is not None,
        is_causal=is_causal,
        capability=library_attention.gpu_capability(),
    )
    return chosen == "cudnn"


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    factor = _default_scale(query, scale)
    if _is_for_library(query, key, value, attn_mask, is_causal):
        out = library_attention.attend(query, key, value, attn_mask, is_causal=is_causal, scale=factor)
        # The log-sum-exp is for the backward, and the library's keeps its own.
        return out, jnp.zeros(query.shape[:3], np.float32)
    key, value = _repeated(key, query), _repeated(value, query)
    blocks = _Blocks.of(query.shape[2], key.shape[2])
    if blocks.is_one:
        return _attend(query, key, value, attn_mask, is_causal, factor, None)

    def step(block: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        rows, queries, mask = block
        return _attend(queries, key, value, mask, is_causal, factor, rows)

    out, lse = lax.map(step, (blocks.rows(), blocks.cut(query), blocks.cut_mask(attn_mask)))
    return blocks.joined(out), blocks.joined(lse)


@lowers(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_backward(
    grad_out: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    logsumexp: jax.Array,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    factor = _default_scale(query, scale)
    if _is_for_library(query, key, value, attn_mask, is_causal):
        return library_attention.attend_backward(
            grad_out, query, key, value, out, attn_mask, is_causal=is_causal, scale=factor
        )
    kv_heads = key.shape[1]
    key, value = _repeated(key, query), _repeated(value, query)
    blocks = _Blocks.of(query.shape[2], key.shape[2])
    wide = jnp.promote_types(query.dtype, np.float32)
    delta = (grad_out.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    # A row without any key has log-sum-exp -inf; at +inf its probabilities are 0.
    lse = jnp.where(jnp.isneginf(logsumexp), -logsumexp, logsumexp)[..., None]

    def gradients(
        queries: jax.Array,
        grads: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        mask: jax.Array | None,
        rows: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = jnp.exp(_scores(queries, key, mask, is_causal, factor, rows) - lse)
        inner = (_einsum("bhqd,bhkd->bhqk", grads, value) - delta) * weights * jnp.asarray(factor, wide)
        inner = inner.astype(query.dtype)
        return (
            _einsum("bhqk,bhkd->bhqd", inner, key),
            _einsum("bhqk,bhqd->bhkd", inner, queries),
            _einsum("bhqk,bhqd->bhkd", weights.astype(grads.dtype), grads),
        )

    if blocks.is_one:
        # Without a barrier XLA finds the scores of the forward pass in these, and keeps them: (batch, heads, length, length) in
        # float32 from every layer, 0.2 GB each for 4 x 1,024 tokens and 12 heads.
        query, key, grad_out = lax.optimization_barrier((query, key, grad_out))
        grad_query, grad_key, grad_value = gradients(query, grad_out, lse, delta, attn_mask, None)
    else:

        def step(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            rows, queries, grads, lse, delta, mask = block
            one, two, three = gradients(queries, grads, lse, delta, mask, rows)
            return (sums[0] + two, sums[1] + three), one

        parts = (
            blocks.rows(),
            *(blocks.cut(x) for x in (query, grad_out, lse, delta)),
            blocks.cut_mask(attn_mask),
        )
        zeros = (jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide))
        (grad_key, grad_value), grad_blocks = lax.scan(step, zeros, parts)
        grad_query = blocks.joined(grad_blocks)
    grad_key, grad_value = _summed(grad_key, kv_heads), _summed(grad_value, kv_heads)
    return grad_query.astype(query.dtype), grad_key.astype(key.dtype), grad_value.astype(value.dtype)
