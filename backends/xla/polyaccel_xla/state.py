"""A handle's values as shards and back. Names are the module's own; an optimizer's state is `<parameter>/<key>`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel_torch.dialect.modules import named_tensors
from polyaccel_torch.dialect.optimizers import named_parameters
from polyaccel_xla.spmd import Placement

_ITS_OWN = "load it into the model or optimizer that it was saved from"


def read(handle: Any, models: Sequence[torch.nn.Module]) -> Iterator[Shard]:
    """Every value as one whole shard on the host; a tied parameter once. `models`: where an optimizer's names come from."""
    for name, tensor in _values(handle, models).items():
        host = tensor.detach().cpu()
        # numpy has no bfloat16: its bits travel as uint16, and `dtype` says what they are.
        data = host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
        yield Shard(name, tuple(host.shape), (0,) * host.dim(), str(host.dtype).removeprefix("torch."), data.copy())


def write(handle: Any, shards: Iterable[Shard], models: Sequence[torch.nn.Module], placement: Placement) -> None:
    """Replace a handle's values by the shards of any mesh.

    Raises CheckpointError, before anything is changed, for missing, unknown or misshapen values.
    """
    if isinstance(handle, torch.nn.Module):
        known = _values(handle, models)
        values = _assemble(shards, {name: tuple(tensor.shape) for name, tensor in known.items()})
        missing = [name for name in known if name not in values]
        if missing:
            raise CheckpointError(f"the saved state lacks {', '.join(missing)}", "give every shard of the state")
        for name, tensor in known.items():
            # New data for the same tensor object: optimizers and tied layers keep it, and no graph is needed to copy.
            tensor.data = placement.upload(values[name].to(tensor.dtype))
        return
    names = _names(handle.optimizer, models)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names.values()}
    for name, value in _assemble(shards, None, prefixes=set(states)).items():
        parameter, _, key = name.rpartition("/")
        states[parameter][key] = value
    for group in handle.param_groups:
        on_host = () if group.get("capturable") else ("step",)
        for parameter in group["params"]:
            if state := states[names[id(parameter)]]:
                handle.state[parameter] = {
                    key: value if key in on_host else placement.upload(value) for key, value in state.items()
                }


def _assemble(
    shards: Iterable[Shard], shapes: Mapping[str, tuple[int, ...]] | None, prefixes: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Whole host tensors by name. Every name is one of `shapes`, or begins with one of `prefixes` where no shape is known."""
    values: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        shape = tuple(shard.global_shape)
        is_known = shard.name in shapes if shapes is not None else shard.name.rpartition("/")[0] in prefixes
        if not is_known:
            raise CheckpointError(f"the saved state has {shard.name!r}, which is not here", _ITS_OWN)
        if shapes is not None and shape != shapes[shard.name]:
            raise CheckpointError(
                f"{shard.name!r} was saved with shape {shape} and has shape {shapes[shard.name]} here", _ITS_OWN
            )
        dtype = getattr(torch, shard.dtype)
        whole = values.setdefault(shard.name, torch.empty(shape, dtype=dtype))
        piece = _from_numpy(shard.data, dtype)
        whole[tuple(slice(start, start + size) for start, size in zip(shard.offset, piece.shape, strict=True))] = piece
        filled[shard.name] = filled.get(shard.name, 0) + piece.numel()
    partial = [name for name, value in values.items() if filled[name] < value.numel()]
    if partial:
        raise CheckpointError(f"the saved state lacks parts of {', '.join(partial)}", "give every shard of the state")
    return values


def _values(handle: Any, models: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    if isinstance(handle, torch.nn.Module):
        return dict(named_tensors(handle))
    names = _names(handle.optimizer, models)
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for group in handle.param_groups
        for parameter in group["params"]
        for key, value in handle.state.get(parameter, {}).items()
        if isinstance(value, (torch.Tensor, float, int))
    }


def _names(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module]) -> dict[int, str]:
    """The names of an optimizer's parameters, by id."""
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = [model for model in models if any(id(parameter) in wanted for parameter in model.parameters())]
    return {id(parameter): name for name, parameter in named_parameters(optimizer, owners).items()}


def _from_numpy(data: Any, dtype: torch.dtype) -> torch.Tensor:
    array = np.array(data)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.as_tensor(array)
