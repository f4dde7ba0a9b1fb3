"""A product with a bias (`nn.Linear`) on sequences in parts: torch weighs what it could exchange for the bias, and gathers sequences
for it where a layer's inputs are cut too. Here only summands are exchanged, and the bias is added to their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from polyaccel_torch.sharded.layouts import laid_out, local_as, mesh_of, reduced, whole


def addmm(op: Any, given: dict[str, Any]) -> Any:
    """beta * bias (n,) + alpha * (m, k) @ (k, n), which are DTensors or whole tensors; a bias of two dims is one too."""
    mesh = mesh_of(given)
    bias, rows, columns = (_as_dtensor(given[name], mesh) for name in ("self", "mat1", "mat2"))
    rows, columns = (one.redistribute(placements=reduced(one, mesh)) for one in (rows, columns))
    of_bias, of_columns, of_result = whole(mesh), whole(mesh), whole(mesh)
    for axis, (left, right) in enumerate(zip(rows.placements, columns.placements, strict=True)):
        if _dim(left) == 1 or _dim(right) == 0 or bias.dim() != 1:
            return _by_its_parts(given, bias, rows, columns)
        if _dim(left) == 0:
            of_result[axis] = left
        elif right == Shard(1):
            of_bias[axis], of_columns[axis], of_result[axis] = Shard(0), right, right
    local = op(
        local_as(bias, mesh, of_bias),
        rows.to_local(),
        local_as(columns, mesh, of_columns),
        beta=given["beta"],
        alpha=given["alpha"],
    )
    shape = torch.Size((rows.shape[0], columns.shape[1]))
    return DTensor.from_local(local, mesh, of_result, run_check=False, shape=shape, stride=(shape[1], 1))


def _by_its_parts(given: dict[str, Any], bias: Any, rows: Any, columns: Any) -> Any:
    product = torch.ops.aten.mm.default(rows, columns)
    product = product.redistribute(placements=reduced(product, product.device_mesh))
    if given["alpha"] != 1:
        product = product * given["alpha"]
    return torch.ops.aten.add.Tensor(product, bias if given["beta"] == 1 else bias * given["beta"])


def _as_dtensor(tensor: Any, mesh: Any) -> Any:
    return tensor if isinstance(tensor, DTensor) else laid_out(tensor, mesh, whole(mesh))


def _dim(place: Placement) -> int | None:
    """That a tensor is cut along."""
    return None if isinstance(place, Replicate) else getattr(place, "dim", None)
