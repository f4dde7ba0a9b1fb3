"""The recurrence of LSTM, GRU and RNN layers (`recurrent.py` defines the operations) as one lax.scan over time per direction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax, nn

from .. import recurrent  # noqa: F401  # defines the operations
from .table import lowers

ops = torch.ops.polyaccel


@lowers(ops.recurrence.default)
def recurrence(
    projected: jax.Array,
    hidden: jax.Array,
    cell: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    kind: str,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype = projected.dtype if kind in ("tanh", "relu") else jnp.promote_types(projected.dtype, hidden.dtype)
    nothing = jnp.zeros((0,), projected.dtype)

    def product(h: jax.Array) -> jax.Array:
        result = h.astype(weight.dtype) @ weight.T
        return result if bias is None else result + bias

    def lstm(carry: Any, x: jax.Array) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(x + product(h), 4, -1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (h, c), (h, c, jnp.concatenate([i, f, g, o], -1))

    def gru(h: jax.Array, x: jax.Array) -> Any:
        (r, z, n), (hr, hz, hn) = jnp.split(x, 3, -1), jnp.split(product(h), 3, -1)
        r, z = nn.sigmoid(r + hr), nn.sigmoid(z + hz)
        n = jnp.tanh(n + r * hn)
        h = (h - n) * z + n
        return h, (h, jnp.concatenate([r, z, n, hn], -1))

    def simple(h: jax.Array, x: jax.Array) -> Any:
        h = jnp.tanh(x + product(h)) if kind == "tanh" else nn.relu(x + product(h))
        return h, h

    if kind == "lstm":
        start = (hidden.astype(dtype), cell.astype(dtype))
        _, (outputs, cells, gates) = lax.scan(lstm, start, projected, reverse=reverse)
        return outputs, cells, gates
    no_cells = jnp.zeros((0,), dtype)
    if kind == "gru":
        _, (outputs, gates) = lax.scan(gru, hidden.astype(dtype), projected, reverse=reverse)
        return outputs, no_cells, gates
    _, outputs = lax.scan(simple, hidden.astype(dtype), projected, reverse=reverse)
    return outputs, no_cells, nothing


@lowers(ops.recurrence_backward.default)
def recurrence_backward(
    grad_hidden: jax.Array,
    grad_cell: jax.Array | None,
    projected: jax.Array,
    hidden: jax.Array,
    cell: jax.Array,
    weight: jax.Array,
    outputs: jax.Array,
    cells: jax.Array,
    gates: jax.Array,
    kind: str,
    reverse: bool,
) -> tuple[jax.Array, ...]:
    """The scan walks time the other way round; the weights' gradients are products over the whole sequence behind it."""
    dtype = outputs.dtype
    before = _before(outputs, hidden.astype(dtype), reverse)
    state = jnp.zeros(hidden.shape, dtype)

    def back(grads: jax.Array) -> jax.Array:
        return (grads.astype(weight.dtype) @ weight).astype(dtype)

    def lstm(carry: Any, values: Any) -> Any:
        dh, dc = carry
        grad_h, grad_c, gate, c, c_before = values
        i, f, g, o = jnp.split(gate, 4, -1)
        dh = dh + grad_h
        squashed = jnp.tanh(c)
        dc = dc + grad_c + dh * o * (1 - squashed * squashed)
        parts = [dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)]
        grads = jnp.concatenate(parts, -1).astype(projected.dtype)
        return (back(grads), (dc * f).astype(dtype)), grads

    def gru(dh: jax.Array, values: Any) -> Any:
        grad_h, gate, h_before = values
        r, z, n, product = jnp.split(gate, 4, -1)
        dh = dh + grad_h
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h_before - n) * z * (1 - z)
        dr = dn * product * r * (1 - r)
        by_product = jnp.concatenate([dr, dz, dn * r], -1).astype(projected.dtype)
        by_projected = jnp.concatenate([dr, dz, dn], -1).astype(projected.dtype)
        return (dh * z + back(by_product)).astype(dtype), (by_projected, by_product)

    def simple(dh: jax.Array, values: Any) -> Any:
        grad_h, h = values
        slope = 1 - h * h if kind == "tanh" else (h > 0).astype(h.dtype)
        grads = ((dh + grad_h) * slope).astype(projected.dtype)
        return back(grads), grads

    by_cell = jnp.zeros_like(cell)
    inputs: tuple[jax.Array, ...]
    if kind == "lstm":
        grad_cell = jnp.zeros_like(cells) if grad_cell is None else grad_cell
        inputs = (grad_hidden, grad_cell, gates, cells, _before(cells, cell.astype(dtype), reverse))
        (by_hidden, last), by_projected = lax.scan(lstm, (state, state), inputs, reverse=not reverse)
        by_product, by_cell = by_projected, last.astype(cell.dtype)
    elif kind == "gru":
        inputs = (grad_hidden, gates, before)
        by_hidden, (by_projected, by_product) = lax.scan(gru, state, inputs, reverse=not reverse)
    else:
        by_hidden, by_projected = lax.scan(simple, state, (grad_hidden, outputs), reverse=not reverse)
        by_product = by_projected
    wide = jnp.promote_types(weight.dtype, jnp.float32)  # sums over the sequence are as wide as a product's
    by_weight = jnp.einsum("tbg,tbh->gh", by_product.astype(wide), before.astype(wide))
    by_bias = by_product.astype(wide).sum((0, 1))
    return (
        by_projected,
        by_hidden.astype(hidden.dtype),
        by_cell,
        by_weight.astype(weight.dtype),
        by_bias.astype(weight.dtype),
    )


def _before(values: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """The value that each step started from."""
    if reverse:
        return jnp.concatenate([values[1:], first[None]])
    return jnp.concatenate([first[None], values[:-1]])
