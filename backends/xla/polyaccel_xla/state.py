"""A handle's values as shards and back. Names are the module's own; an optimizer's state is `<parameter>/<key>`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel_xla.spmd import Placement


def read(handle: Any, names: Mapping[int, str]) -> Iterator[Shard]:
    """Every value as one whole shard on the host; a tied parameter once. `names`: of parameters, by id."""
    for name, tensor in _tensors(handle, names).items():
        host = tensor.detach().cpu()
        # numpy has no bfloat16: its bits travel as uint16, and `dtype` says what they are.
        data = host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
        yield Shard(name, tuple(host.shape), (0,) * host.dim(), str(host.dtype).removeprefix("torch."), data.copy())


def write(handle: Any, shards: Iterable[Shard], names: Mapping[int, str], placement: Placement) -> None:
    """Replace a handle's values by the shards of any mesh. Raises CheckpointError, before anything is changed, for missing,
    unknown or misshapen values."""
    is_module = isinstance(handle, torch.nn.Module)
    known = _tensors(handle, names) if is_module else _shapes_by_prefix(handle, names)
    values: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        like = known.get(shard.name if is_module else shard.name.rpartition("/")[0])
        if like is None:
            raise CheckpointError(
                f"the saved state has {shard.name!r}, which is not here", "load it into the model or optimizer that it was saved from"
            )
        if is_module and tuple(shard.global_shape) != tuple(like.shape):
            raise CheckpointError(
                f"{shard.name!r} was saved with shape {tuple(shard.global_shape)} and has shape {tuple(like.shape)} here",
                "load it into the model or optimizer that it was saved from",
            )
        dtype = getattr(torch, shard.dtype)
        whole = values.setdefault(shard.name, torch.empty(shard.global_shape, dtype=dtype))
        piece = _from_numpy(shard.data, dtype)
        whole[tuple(slice(start, start + size) for start, size in zip(shard.offset, piece.shape, strict=True))] = piece
        filled[shard.name] = filled.get(shard.name, 0) + piece.numel()
    wanted = known if is_module else values
    missing = [name for name in wanted if name not in values or filled[name] < values[name].numel()]
    if missing:
        raise CheckpointError(f"the saved state lacks {', '.join(missing)}", "give every shard of the state")
    if is_module:
        _assign(known, values, placement)
    else:
        _assign_optimizer(handle.optimizer, values, names, placement)


def _assign(known: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], placement: Placement) -> None:
    for name, tensor in known.items():
        # New data for the same tensor object: optimizers and tied layers keep it, and no graph is needed to copy.
        tensor.data = placement.upload(values[name].to(tensor.dtype))


def _assign_optimizer(
    optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor], names: Mapping[int, str], placement: Placement
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[id(parameter)]}/"
            state = {name.removeprefix(prefix): value for name, value in values.items() if name.rpartition("/")[0] + "/" == prefix}
            if not state:
                continue
            on_host = () if group.get("capturable") else ("step",)
            optimizer.state[parameter] = {
                name: value if name in on_host else placement.upload(value) for name, value in state.items()
            }


def _tensors(handle: Any, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    if isinstance(handle, torch.nn.Module):
        persistent = handle.state_dict(keep_vars=True)
        seen: set[int] = set()
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in persistent.items():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
                kept[name] = tensor
            seen.add(id(tensor))
        return kept
    return {
        f"{names[id(parameter)]}/{name}": torch.as_tensor(value)
        for group in handle.param_groups
        for parameter in group["params"]
        for name, value in handle.state.get(parameter, {}).items()
        if isinstance(value, (torch.Tensor, float, int))
    }


def _shapes_by_prefix(handle: Any, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    return {names[id(parameter)]: parameter for group in handle.param_groups for parameter in group["params"]}


def _from_numpy(data: Any, dtype: torch.dtype) -> torch.Tensor:
    array = np.ascontiguousarray(data)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16).reshape(np.shape(data))
    return torch.from_numpy(array.copy()).reshape(np.shape(data))
