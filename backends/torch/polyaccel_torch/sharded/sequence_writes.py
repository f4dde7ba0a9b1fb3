"""Writes into a part of a sequence that would be lost: what torch gathers for `x[:, :4]` is no view of x, and nobody would see it written.

Checked while a model computes its forward pass, where scripts of one device may rely on views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode

from polyaccel import trees
from polyaccel.errors import UnsupportedError

_NO_WRITES = frozenset({"__index__", "__init__", "__int__", "__invert__", "__iter__", "requires_grad_", "retain_grad_"})


class RefuseLostWrites(TorchFunctionMode):
    """Inside, a write in place raises UnsupportedError where it would reach a copy alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = kwargs.get("out")
        if written is None and args and _writes(func, kwargs):
            written = args[0]
        if isinstance(written, DTensor):
            lost = _is_copy_of_a_view(written)
            if func.__name__ == "__setitem__" and not lost and _touches_a_cut_dim(written, args[1]):
                if _is_plain(written, args):
                    return _write_whole(*args)
                lost = True
            if lost or "out" in kwargs:
                raise UnsupportedError(
                    f"the model writes in place ({func.__name__}) into a part of a tensor of shape {tuple(written.shape)} that is cut"
                    " along its sequence by mesh.sequence",
                    "compute it without writing, by torch.where or torch.cat, or leave mesh.sequence at 1 for this model",
                )
        return func(*args, **kwargs)


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in _NO_WRITES:
        return False
    if name == "__setitem__" or kwargs.get("inplace"):
        return True
    return (name.startswith("__i") and name.endswith("__")) or (name.endswith("_") and not name.endswith("__"))


def _is_copy_of_a_view(tensor: DTensor) -> bool:
    base = tensor._base
    if not isinstance(base, DTensor):
        return False
    mine, theirs = tensor._local_tensor, base._local_tensor
    if isinstance(mine, AsyncCollectiveTensor) or isinstance(theirs, AsyncCollectiveTensor):
        return mine is not theirs
    return mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def _is_plain(written: DTensor, args: Any) -> bool:
    """Whether no gradient flows through a write, as into token ids and masks."""
    leaves, _ = trees.flatten(args)
    needs_grad = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    return not needs_grad and not any(isinstance(place, Partial) for place in written.placements)


@torch.no_grad()
def _write_whole(written: DTensor, index: Any, value: Any) -> None:
    """`written[index] = value`, in all of it, of which each process keeps its part."""
    mesh, placements = written.device_mesh, written.placements
    everywhere = [Replicate()] * mesh.ndim

    def whole(leaf: Any) -> Any:
        return leaf.redistribute(placements=everywhere).to_local() if isinstance(leaf, DTensor) else leaf

    all_of_it = whole(written).clone()
    all_of_it[whole(index) if isinstance(index, DTensor) else trees.map_leaves(whole, index)] = whole(value)
    laid_out = DTensor.from_local(all_of_it, mesh, everywhere, run_check=False).redistribute(placements=placements)
    written.to_local().copy_(laid_out.to_local())


def _touches_a_cut_dim(tensor: DTensor, index: Any) -> bool:
    """Whether `tensor[index] = ...` says anything of a dim that is cut: it would write into what was gathered."""
    cut = [getattr(place, "dim", None) for place in tensor.placements if not isinstance(place, Replicate)]
    if not cut:
        return False
    entries = list(index) if isinstance(index, tuple) else [index]
    if None in cut or not all(entry is Ellipsis or isinstance(entry, (slice, int)) for entry in entries):
        return True  # summands, or an index that is a tensor
    if any(entry is Ellipsis for entry in entries):
        at = next(position for position, entry in enumerate(entries) if entry is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (tensor.dim() - len(entries) + 1)
    return any(dim < len(entries) and entries[dim] != slice(None) for dim in cut if dim is not None)
