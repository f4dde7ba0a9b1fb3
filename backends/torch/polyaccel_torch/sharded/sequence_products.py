"""Products of matrices of which rows, columns or what is summed up lie in pieces: those of `nn.Linear`, forward and backward.

torch weighs every way to lay operands out, also a bias, and may gather sequences in a layer whose inputs are cut too. Here pieces are
multiplied where they lie, only sums are exchanged, and a bias is added to a sum once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from polyaccel_torch.sharded.layouts import Placements, laid_out, local_as, mesh_of, reduced, whole


def mm(op: Any, given: dict[str, Any]) -> Any:
    """(m, k) @ (k, n); what the pieces do not agree in is gathered of the second."""
    mesh = mesh_of(given)
    rows, columns, places = _agreed(given["self"], given["mat2"], mesh)
    return _result(op(rows.to_local(), columns.to_local()), mesh, places, rows, columns)


def addmm(op: Any, given: dict[str, Any]) -> Any:
    """beta * bias + alpha * (m, k) @ (k, n), with a bias (n,), or of two dims."""
    mesh = mesh_of(given)
    rows, columns, places = _agreed(given["mat1"], given["mat2"], mesh)
    bias = given["self"]
    if bias.dim() != 1 or any(isinstance(place, Partial) for place in places):
        product = _result(torch.mm(rows.to_local(), columns.to_local()), mesh, places, rows, columns)
        product = product.redistribute(placements=reduced(product, mesh))
        if given["alpha"] != 1:
            product = product * given["alpha"]
        return torch.ops.aten.add.Tensor(product, bias if given["beta"] == 1 else bias * given["beta"])
    of_bias = [Shard(0) if place == Shard(1) else Replicate() for place in places]
    options = {"beta": given["beta"], "alpha": given["alpha"]}
    local = op(local_as(bias, mesh, of_bias), rows.to_local(), columns.to_local(), **options)
    return _result(local, mesh, places, rows, columns)


def _agreed(left: Any, right: Any, mesh: DeviceMesh) -> tuple[Any, Any, list[Placement]]:
    """Operands whose pieces can be multiplied, and how the result then lies."""
    left, right = (one if isinstance(one, DTensor) else laid_out(one, mesh, whole(mesh)) for one in (left, right))
    rows, columns, result = list(reduced(left, mesh)), list(reduced(right, mesh)), whole(mesh)
    for axis in range(mesh.ndim):
        if not _fit(rows[axis], columns[axis]):
            columns[axis] = Replicate()
        if _dim(rows[axis]) == 1 and isinstance(columns[axis], Replicate):
            if rows[axis] == Shard(1):
                columns[axis] = Shard(0)
            else:
                rows[axis] = Replicate()
        elif _dim(columns[axis]) == 0 and isinstance(rows[axis], Replicate):
            if columns[axis] == Shard(0):
                rows[axis] = Shard(1)
            else:
                columns[axis] = Replicate()
        if _dim(rows[axis]) == 1:
            result[axis] = Partial()
        elif _dim(rows[axis]) == 0:
            result[axis] = rows[axis]
        elif columns[axis] == Shard(1):
            result[axis] = columns[axis]
        else:
            columns[axis] = Replicate()
    return left.redistribute(placements=rows), right.redistribute(placements=columns), result


def _fit(row: Placement, column: Placement) -> bool:
    """Whether at most one of the two is cut, or both along what is summed up, in the same way."""
    if isinstance(row, Replicate) or isinstance(column, Replicate):
        return True
    same = getattr(row, "split_factor", 1) == getattr(column, "split_factor", 1)
    return _dim(row) == 1 and _dim(column) == 0 and same


def _dim(place: Placement) -> int | None:
    """That a tensor is cut along."""
    return getattr(place, "dim", None)


def _result(local: torch.Tensor, mesh: DeviceMesh, places: Placements, rows: Any, columns: Any) -> DTensor:
    shape = torch.Size((rows.shape[0], columns.shape[1]))  # pieces may differ in size
    return DTensor.from_local(local, mesh, places, run_check=False, shape=shape, stride=(shape[1], 1))
