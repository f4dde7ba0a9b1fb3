"""This process's piece of a global tensor: where it lies, cutting it out of a whole one, joining it from pieces of any mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec, Shard
from polyaccel_torch.dialect.states import tensor_of
from polyaccel_torch.sharded.mesh import with_layout_of

Box = tuple[tuple[int, ...], tuple[int, ...]]  # shape and offset


def box_of(tensor: torch.Tensor) -> Box:
    """Shape and offset of this process's piece in the whole; the shape has a 0 where the process has none of it."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def piece_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, laid out as `like`, on its device."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    shape, offset = box_of(like)
    where = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return with_layout_of(whole[where].to(like.device).contiguous().clone(), like)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that lies in pieces, on every process. Every process of its mesh must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    # Outermost axis first: where `fsdp` cuts a piece of `tensor` again, these smaller pieces have to be joined before.
    for position in range(len(placements)):
        if not isinstance(placements[position], Replicate):
            placements[position] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


class LocalPieces:
    """Host tensors of this process's pieces, filled by the shards that cover them; of the rest of a checkpoint nothing is kept."""

    def __init__(self, shards: Iterable[Shard], box: Callable[[str, tuple[int, ...]], Box]) -> None:
        self.specs: dict[str, ArraySpec] = {}  # global
        self.pieces: dict[str, torch.Tensor] = {}
        missing: dict[str, int] = {}
        for shard in shards:
            name, data = shard.name, shard.data
            if name not in self.pieces:
                shape, _ = box(name, tuple(shard.global_shape))
                self.specs[name] = ArraySpec(tuple(shard.global_shape), shard.dtype)
                self.pieces[name] = torch.empty(shape, dtype=getattr(torch, shard.dtype))
                missing[name] = self.pieces[name].numel()
            shape, offset = box(name, tuple(shard.global_shape))
            common = [_common(a, n, b, m) for a, n, b, m in zip(offset, shape, shard.offset, data.shape, strict=True)]
            if all(size > 0 for _, _, size in common):
                mine = tuple(slice(to, to + size) for to, _, size in common)
                theirs = tuple(slice(at, at + size) for _, at, size in common)
                piece = tensor_of(data[theirs], shard.dtype)
                self.pieces[name][mine] = piece
                missing[name] -= piece.numel()
        for name, count in missing.items():
            if count > 0:
                raise CheckpointError(
                    f"{name}: {count} elements of this process's piece are not there",
                    "give the shards of all processes",
                )


def _common(start: int, size: int, other: int, other_size: int) -> tuple[int, int, int]:
    """Where two intervals overlap: from the start of the first, from the start of the second, and how long."""
    begin, end = max(start, other), min(start + size, other + other_size)
    return begin - start, begin - other, end - begin


def as_like(piece: torch.Tensor, like: Any) -> torch.Tensor:
    """A host piece in the dtype that it has, on the device and in the layout of `like`."""
    return with_layout_of(piece.to(like.device), like)
