"""Gradients that each data shard has of its own, whole, in the middle of an accumulation window: those that FSDP2 keeps aside, and those
of parameters that a rule keeps whole. As shards they have one entry per data shard; nothing is averaged for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from polyaccel.protocols import Shard
from polyaccel_torch.dialect.modules import named_tensors
from polyaccel_torch.dialect.states import shard_of
from polyaccel_torch.sharded import fsdp
from polyaccel_torch.sharded.mesh import ShardedMesh, local_of, settle
from polyaccel_torch.sharded.pieces import Box, LocalPieces, as_like, box_of, whole_of

_NONE: tuple[Any, torch.dtype | None] = (None, None)


def read(module: nn.Module, part: FSDPModule, mesh: ShardedMesh, *, scale: float) -> Iterator[Shard]:
    """This process's part of the gradients of its data shard, divided by `scale`, as one entry of a new dim 0. All processes must call
    it."""
    records = fsdp.records_of(part)
    index, number = mesh.data_shard
    for name, tensor in named_tensors(module):
        record, _ = records.get(id(tensor), _NONE)
        grad = _settled(tensor) if record is None else _whole(record, tensor)
        if grad is None or not mesh.owns(grad, each_data_shard=True):
            continue
        shape, offset = box_of(grad)
        if all(shape):
            own = shard_of(name, local_of(grad if scale == 1.0 else grad / scale))
            yield Shard(name, (number, *tensor.shape), (index, *offset), own.dtype, own.data[None])


def write(module: nn.Module, part: FSDPModule, mesh: ShardedMesh, shards: Iterable[Shard], *, scale: float) -> None:
    """Replace the gradients of this process's data shard, times `scale`; parameters that are not given have none afterwards."""
    records = fsdp.records_of(part)
    live = dict(named_tensors(module))

    def box(name: str, shape: tuple[int, ...]) -> Box:
        tensor = live.get(name)
        record, _ = records.get(id(tensor), _NONE)
        if tensor is None or tuple(tensor.shape) != shape:
            return shape, (0,) * len(shape)
        return box_of(tensor) if record is None else _box(record, shape)

    given = LocalPieces(shards, box)
    fsdp.drop_own_gradients(live.values())
    for name, tensor in live.items():
        tensor.grad = None
        piece = given.pieces.get(name)
        if piece is None:
            continue
        record, kind = records.get(id(tensor), _NONE)
        if record is None:
            tensor.grad = as_like(piece.to(tensor.dtype) * scale, tensor)
        else:
            # Where FSDP2 adds the next one to it, in any precision.
            record.unsharded_accumulated_grad = _laid_out(record, piece.to(mesh.device, kind) * scale)
    if given.pieces:
        fsdp.has_accumulated(part)


def _settled(tensor: torch.Tensor) -> torch.Tensor | None:
    return None if tensor.grad is None else settle(tensor)


def _whole(record: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """What this data shard has of a parameter's gradient, and what all of them had averaged before."""
    own = fsdp.own_gradient(record)
    spec = record._unsharded_dtensor_spec
    if own is not None and spec is not None and own.placements != spec.placements:
        own = own.redistribute(placements=spec.placements)
    if tensor.grad is None:
        return own
    averaged = whole_of(settle(tensor)).to(tensor.device if own is None else own.device)
    shape, offset = _box(record, tuple(tensor.shape))
    local = averaged[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    laid_out = _laid_out(record, local.contiguous())
    return laid_out if own is None else own + laid_out


def _box(record: Any, shape: tuple[int, ...]) -> Box:
    spec = record._unsharded_dtensor_spec
    if spec is None:
        return shape, (0,) * len(shape)
    local, offset = compute_local_shape_and_global_offset(shape, spec.mesh, spec.placements)
    return tuple(local), tuple(offset)


def _laid_out(record: Any, local: torch.Tensor) -> torch.Tensor:
    spec = record._unsharded_dtensor_spec
    if spec is None:
        return local
    return DTensor.from_local(local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride)
