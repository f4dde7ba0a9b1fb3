"""Norms and limits of gradients that lie in pieces, on meshes that differ from parameter to parameter.

torch's own `clip_grad_norm_` stacks norms of tensors of several meshes, which it cannot. Here each kind of layout has its norm added up
over the axes that it is cut along, and the kinds are combined; what several processes hold alike counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from polyaccel_torch.dialect import weights
from polyaccel_torch.sharded.mesh import ShardedMesh, axes_of, local_of, settle


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, mesh: ShardedMesh
) -> torch.Tensor:
    """Scale all gradients by one factor so that their norm is at most `max_norm`; returns the norm before, a scalar on the device.

    Every process must call it with the same parameters.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = total_norm(parameters, float(norm_type), mesh)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # torch's own formula
    weights.multiply(_pieces(parameters), factor)
    return norm


@torch.no_grad()
def clip_grad_value(parameters: Iterable[torch.Tensor], clip_value: float) -> None:
    """Every element of the gradients within `clip_value` of zero."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for piece in _pieces(parameters):
        piece.clamp_(-float(clip_value), float(clip_value))


def total_norm(parameters: Iterable[torch.Tensor], norm_type: float, mesh: ShardedMesh) -> torch.Tensor:
    """The p-norm of all gradients as one vector, on the device; inf is the largest absolute value. Every process must call it."""
    # By the parameters, not by their gradients: all processes must meet in the same exchanges.
    kinds: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for parameter in parameters:
        pieces = kinds.setdefault(axes_of(parameter), [])
        if parameter.grad is not None:
            pieces.append(local_of(settle(parameter)))
    is_max = math.isinf(norm_type)
    # Powers of norms would leave float32. Exchanges take place on the device, gradients may rest in host memory.
    total = torch.zeros((), device=mesh.device, dtype=torch.float64)
    for axes in sorted(kinds):
        norm = nn.utils.get_total_norm(kinds[axes], norm_type).to(total)
        part = norm if is_max else norm**norm_type
        for axis in axes:
            dist.all_reduce(part, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=mesh.group(axis))
        total = torch.maximum(total, part) if is_max else total + part
    return (total if is_max else total ** (1.0 / norm_type)).float()


def _pieces(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [local_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
