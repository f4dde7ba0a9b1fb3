"""Dtypes that PyTorch's own shape functions tell wrong, set right in a captured graph. Each goes with the last PyTorch that has it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def correct_dtypes(graph: Graph) -> None:
    """The log-sum-exp of float64 attention is float64; PyTorch 2.11 says float32, which its kernel does not do."""
    for node in graph.nodes:
        if node.target is not _ATTENTION:
            continue
        out, logsumexp = node.meta["val"]
        if out.dtype is torch.float64 and logsumexp.dtype is torch.float32:
            wide = logsumexp.double()
            node.meta["val"] = (out, wide)
            for user in node.users:
                if user.target is operator.getitem and user.args[1] == 1:
                    user.meta["val"] = wide
