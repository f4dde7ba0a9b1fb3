"""Keeps what `torch.utils.checkpoint` promises: without a barrier XLA would merge a repeated forward with the first and save nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jax import lax
from torch.fx import Graph, Node

from .sources import is_recomputed

_SAME_VALUE = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, operator.getitem)


def barrier(*values: Any) -> Sequence[Any]:
    """`values`, in a way that keeps XLA from seeing that they are what they are (`jax.checkpoint` does the same)."""
    result: Sequence[Any] = lax.optimization_barrier(values)
    return result


def hold_back_recomputation(graph: Graph) -> None:
    """Put a barrier before every repeated block: it starts when the gradient that needs it is there, from values of its own."""
    for block, trigger in _blocks(graph):
        inside = set(block)
        outside = dict.fromkeys(used for node in block for used in node.all_input_nodes if used not in inside)
        arrays = [node for node in outside if isinstance(node.meta.get("val"), torch.Tensor)]
        if not arrays or trigger is None:
            continue
        with graph.inserting_before(block[0]):
            held = graph.call_function(barrier, (*arrays, trigger))
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
        elif node.target not in _SAME_VALUE:
            block = []
        if isinstance(node.meta.get("val"), torch.Tensor) and node.op == "call_function":
            latest = node
    return blocks
