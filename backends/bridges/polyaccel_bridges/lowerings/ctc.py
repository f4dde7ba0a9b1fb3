"""Connectionist temporal classification (Graves et al. 2006) as one operation with its backward, which `fixed_shapes.py` puts in.

ATen's own operation reads the lengths' values to choose a shape, so a captured program cannot contain it. This one takes lengths as
tensors: padded states beyond a target's end never flow back into it, and time steps beyond an input's end keep the last state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from .promotion import INT32
from .table import lowers

_ARGUMENTS = "Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank"
torch.library.define("polyaccel::ctc_loss", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "polyaccel::ctc_loss_backward",
    "(Tensor grad, Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths,"
    " Tensor losses, Tensor log_alpha, int blank, bool zero_infinity) -> Tensor",
)


@torch.library.register_fake("polyaccel::ctc_loss")
def _(log_probs: torch.Tensor, targets: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    time, batch, _ = log_probs.shape
    return log_probs.new_empty(batch), log_probs.new_empty(time, batch, 2 * targets.shape[1] + 1)


@torch.library.register_fake("polyaccel::ctc_loss_backward")
def _(grad: torch.Tensor, log_probs: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(log_probs)


def _states(targets: jax.Array, blank: int) -> tuple[jax.Array, jax.Array]:
    """(batch, 2 * length + 1) classes with a blank around every target, and whether a path may enter from two states before."""
    batch, length = targets.shape
    classes = jnp.full((batch, 2 * length + 1), blank, INT32).at[:, 1::2].set(targets.astype(INT32))
    before = jnp.concatenate([jnp.full((batch, 2), blank, INT32), classes[:, :-2]], axis=1)[:, : 2 * length + 1]
    here = jnp.arange(2 * length + 1)
    return classes, (here >= 2) & (classes != before)


def _log_add(*terms: jax.Array) -> jax.Array:
    """log of the sum of exponentials; minus infinity where all are."""
    largest = jnp.stack(terms).max(0)
    base = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    return jnp.log(sum((jnp.exp(term - base) for term in terms), jnp.zeros_like(base))) + base


def _shifted(x: jax.Array, by: int) -> jax.Array:
    """States moved up (or down, if negative) by that many places; minus infinity enters."""
    empty = jnp.full((x.shape[0], min(abs(by), x.shape[1])), -jnp.inf, x.dtype)
    return jnp.concatenate([empty, x[:, :-by]] if by > 0 else [x[:, -by:], empty], axis=1)[:, : x.shape[1]]


def _emissions(log_probs: jax.Array, classes: jax.Array) -> jax.Array:
    """(time, batch, states): the log probability of each state's class."""
    return jnp.take_along_axis(log_probs, classes[None], axis=2, mode="clip")


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index.astype(INT32)[:, None], axis=1, mode="clip")[:, 0]


@lowers(torch.ops.polyaccel.ctc_loss.default)
def ctc_loss(
    log_probs: jax.Array, targets: jax.Array, input_lengths: jax.Array, target_lengths: jax.Array, blank: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihoods (batch,), and the log of the forward variables (time, batch, states)."""
    classes, may_skip = _states(targets, blank)
    emitted = _emissions(log_probs, classes)
    minus_infinity = jnp.array(-jnp.inf, log_probs.dtype)
    start = jnp.where(jnp.arange(classes.shape[1]) < 2, emitted[0], minus_infinity)

    def advance(alpha: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        skipped = jnp.where(may_skip, _shifted(alpha, 2), minus_infinity)
        following = _log_add(alpha, _shifted(alpha, 1), skipped) + now
        return following, following

    _, rest = lax.scan(advance, start, emitted[1:])
    alpha = jnp.concatenate([start[None], rest])
    last = jnp.maximum(input_lengths.astype(INT32) - 1, 0)
    final = jnp.take_along_axis(alpha, last[None, :, None], axis=0, mode="clip")[0]
    blank_end = _at(final, 2 * target_lengths)
    label_end = jnp.where(target_lengths > 0, _at(final, jnp.maximum(2 * target_lengths - 1, 0)), minus_infinity)
    losses = -_log_add(blank_end, label_end)
    nothing = jnp.where(target_lengths == 0, jnp.zeros_like(losses), jnp.full_like(losses, jnp.inf))
    return jnp.where(input_lengths == 0, nothing, losses), alpha


@lowers(torch.ops.polyaccel.ctc_loss_backward.default)
def ctc_loss_backward(
    grad: jax.Array,
    log_probs: jax.Array,
    targets: jax.Array,
    input_lengths: jax.Array,
    target_lengths: jax.Array,
    losses: jax.Array,
    log_alpha: jax.Array,
    blank: int,
    zero_infinity: bool,
) -> jax.Array:
    """ATen's gradient: probability minus occupancy, which is the one of the logits before a log_softmax."""
    time, batch, _ = log_probs.shape
    classes, may_skip = _states(targets, blank)
    emitted = _emissions(log_probs, classes)
    minus_infinity = jnp.array(-jnp.inf, log_probs.dtype)
    here = jnp.arange(classes.shape[1])
    ends = 2 * target_lengths.astype(INT32)[:, None]
    is_end = (here == ends) | (here == ends - 1)
    may_leave = jnp.concatenate([may_skip[:, 2:], jnp.zeros((batch, 2), jnp.bool_)], axis=1)[:, : classes.shape[1]]

    def recede(beta: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, now = given
        skipped = jnp.where(may_leave, _shifted(beta, -2), minus_infinity)
        inside = _log_add(beta, _shifted(beta, -1), skipped) + now
        is_last = (step == input_lengths - 1)[:, None]
        before = jnp.where(is_last, jnp.where(is_end, now, minus_infinity), inside)
        before = jnp.where((step >= input_lengths)[:, None] | (here > ends), minus_infinity, before)
        return before, before

    start = jnp.full(classes.shape, -jnp.inf, log_probs.dtype)
    _, log_beta = lax.scan(recede, start, (jnp.arange(time), emitted), reverse=True)
    through = log_alpha + log_beta  # emitted is in both
    occupied = jnp.exp(through + losses[None, :, None] - jnp.where(jnp.isneginf(through), 0, emitted))
    rows = jnp.arange(batch)[:, None]
    occupancy = jnp.zeros_like(log_probs).at[:, rows, classes].add(occupied, mode="drop")
    gradient = jnp.exp(log_probs) - occupancy
    impossible = jnp.isposinf(losses)[None, :, None]
    gradient = jnp.where(impossible | jnp.isneginf(log_probs), jnp.array(jnp.nan, log_probs.dtype), gradient)
    gradient = gradient * grad[None, :, None]
    if zero_infinity:
        gradient = jnp.where(impossible, jnp.zeros_like(gradient), gradient)
    is_padding = jnp.arange(time)[:, None] >= input_lengths[None, :]
    return jnp.where(is_padding[:, :, None], jnp.zeros_like(gradient), gradient)
