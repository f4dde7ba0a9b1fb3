"""Arguments of an operation as this process's pieces, and its results as DTensors again: what rules of operations are written with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from polyaccel import trees

Placements = Sequence[Placement]


def mesh_of(given: dict[str, Any]) -> DeviceMesh:
    """That of the first DTensor among arguments by name."""
    leaves, _ = trees.flatten(given)
    return next(leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor))


def local_as(tensor: Any, mesh: DeviceMesh, placements: Placements) -> Any:
    """This process's piece of a tensor that lies so; None stays."""
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):  # whole
        tensor = DTensor.from_local(tensor, mesh, whole(mesh), run_check=False)
    return tensor.redistribute(placements=placements).to_local()


def laid_out(local: torch.Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """The DTensor of which each process has such a piece; all pieces have one shape."""
    return DTensor.from_local(local, mesh, placements, run_check=False)


def whole(mesh: DeviceMesh) -> list[Placement]:
    """Every process has all of it."""
    return [Replicate()] * mesh.ndim


def reduced(like: Any, mesh: DeviceMesh) -> Placements:
    """As a tensor lies, but never in summands."""
    placements = like.placements if isinstance(like, DTensor) else whole(mesh)
    return [Replicate() if isinstance(place, Partial) else place for place in placements]
