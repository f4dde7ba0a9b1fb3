"""The backward pass inside a capture: gradients by PyTorch's own autograd, from a scalar loss or from cotangents that are inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental.proxy_tensor import get_proxy_mode

COTANGENT = "polyaccel_cotangent"  # in the meta of a node: the index of the output whose cotangent it stands for


def gradients(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], *, is_loss: bool
) -> list[torch.Tensor | None]:
    """The gradients of the wanted leaves, None for a leaf that is not reached.

    `is_loss`: of the first output. Otherwise of all outputs that need gradients, each times a cotangent that becomes an input
    of the backward half.
    """
    roots = [(index, out) for index, out in enumerate(outputs) if out.requires_grad]
    if not roots or not wanted:
        return [None] * len(wanted)
    if is_loss:
        roots = roots[:1]
    seeds = None if is_loss else [_cotangent(index, out) for index, out in roots]
    heads = [out for _, out in roots]
    nodes = _autograd_nodes(heads)
    if not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):
        return _run_engine(heads, seeds, wanted)
    # A custom Function may run a backward of its own (reentrant checkpointing), whose gradients reach `.grad` and nothing else.
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    before = [(leaf, leaf.grad) for leaf in leaves if not any(leaf is tensor for tensor in wanted)]
    try:
        torch.autograd.backward(heads, seeds)
        return [tensor.grad for tensor in wanted]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def _run_engine(
    heads: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor] | None, wanted: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """`torch.autograd.grad`, which would switch off the function modes that a checkpointed forward was first run under."""
    cotangents = tuple(torch.ones_like(head) for head in heads) if seeds is None else tuple(seeds)
    found: tuple[torch.Tensor | None, ...] = _engine_run_backward(
        tuple(heads), cotangents, False, False, tuple(wanted), True, accumulate_grad=False
    )
    return list(found)


def _autograd_nodes(heads: Sequence[torch.Tensor]) -> list[Any]:
    found: dict[Any, None] = {}
    waiting: list[Any] = [head.grad_fn for head in heads]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        waiting.extend(following for following, _ in node.next_functions)
    return list(found)


def _cotangent(index: int, output: torch.Tensor) -> torch.Tensor:
    """A tensor whose node stands for the cotangent of an output: `capture_vjp` makes it an input of the backward half."""
    seed = torch.empty(tuple(output.shape), dtype=output.dtype, device="cpu")
    proxies = get_proxy_mode()
    assert proxies is not None
    node = next(iter(reversed(proxies.tracer.graph.nodes)))
    node.meta[COTANGENT] = index
    return seed
