"""Keeps what `torch.utils.checkpoint` promises: without a barrier XLA would merge a repeated forward with the first and save nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import torch
from jax import lax
from torch.fx import Graph, Node

from .sources import is_recomputed

_ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


def barrier(num_made: int, *values: Any) -> Sequence[Any]:
    """All but the last of `values`, in a way that keeps XLA from seeing that they are what they are, and from starting before the last.

    The first `num_made` were computed, the others are inputs of the program. `jax.checkpoint` has the same barrier, which XLA's
    CPU compiler takes away before it looks for equal operations: there, a branch that is never taken stands in its place. Not for
    inputs, to copy which would cost what is to be saved: theirs is the barrier that `polyaccel_jax.late_gathers` sees through.
    """
    *arrays, trigger = values
    made, given = arrays[:num_made], arrays[num_made:]
    if not made or not trigger.size:
        return _barrier(*values)
    held: Sequence[Any] = lax.platform_dependent(*made, trigger, cpu=_branch, default=_barrier)
    return [*held, *_barrier(*given, trigger)]


def _barrier(*values: Any) -> list[Any]:
    return list(lax.optimization_barrier(values))[:-1]


def _branch(*values: Any) -> Sequence[Any]:
    *made, trigger = values
    one = trigger.reshape(-1)[0]
    is_never = jnp.sin(lax.convert_element_type(one.real, jnp.float32)) > 2  # which XLA does not know
    held: Sequence[Any] = lax.cond(is_never, lambda *v: [jnp.zeros_like(one) for one in v], lambda *v: list(v), *made)
    return held


def hold_back_recomputation(graph: Graph) -> None:
    """Put a barrier before every repeated block: it starts when the gradient that needs it is there, from values of its own."""
    for block, trigger in _blocks(graph):
        inside = set(block)
        outside = dict.fromkeys(used for node in block for used in node.all_input_nodes if used not in inside)
        tensors = [node for node in outside if isinstance(node.meta.get("val"), torch.Tensor)]
        made = [node for node in tensors if node.op == "call_function"]
        arrays = [*made, *(node for node in tensors if node.op != "call_function")]
        if not arrays or trigger is None:
            continue
        with graph.inserting_before(block[0]):
            held = graph.call_function(barrier, (len(made), *arrays, trigger))
            held.meta.update(block[0].meta, val=None)
            for index, array in enumerate(arrays):
                own = graph.call_function(operator.getitem, (held, index))
                own.meta.update(array.meta)
                for node in block:
                    node.replace_input_with(array, own)


def _blocks(graph: Graph) -> list[tuple[list[Node], Node | None]]:
    """Runs of repeated operations, each with the last value that was computed before it."""
    blocks: list[tuple[list[Node], Node | None]] = []
    block: list[Node] = []
    latest: Node | None = None
    for node in graph.nodes:
        if is_recomputed(node):
            if not block:
                block = [node]
                blocks.append((block, latest))
            else:
                block.append(node)
        elif node.target not in (*_ALIASES, operator.getitem):
            block = []
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor) and node.op == "call_function"
        if is_tensor and node.target not in _ALIASES:  # the block's own input, detached, is there long before
            latest = node
    return blocks
