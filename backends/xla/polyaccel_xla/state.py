"""A handle's values as shards and back, named as on every engine that runs torch; what lies in pieces is given in these pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch_xla.distributed import spmd
from torch_xla.distributed.spmd import XLAShardedTensor

from polyaccel.protocols import ArraySpec, Shard
from polyaccel_torch.dialect.modules import named_tensors
from polyaccel_torch.dialect.optimizers import named_parameters
from polyaccel_torch.dialect.states import (
    assemble,
    by_parameter,
    check_arrays,
    check_slots,
    shard_of,
    slots,
    spec_of,
)
from polyaccel_xla.spmd import Placement


def read(handle: Any, models: Sequence[torch.nn.Module], *, is_main: bool) -> Iterator[Shard]:
    """This process's part of every value; a tied parameter once. `models`: where an optimizer's names come from.

    What is whole on every device comes from the main process. The devices must have finished.
    """
    if isinstance(handle, torch.nn.Module):
        values = list(named_tensors(handle))
    else:
        values = list(slots(handle.optimizer, _parameters(handle.optimizer, models)))
    for name, tensor in values:
        yield from _own_shards(name, tensor, is_main=is_main)


def check(handle: Any, given: Mapping[str, ArraySpec], models: Sequence[torch.nn.Module]) -> None:
    """Raises CheckpointError for missing, unknown or misshapen values."""
    if isinstance(handle, torch.nn.Module):
        check_arrays(type(handle).__name__, {name: spec_of(tensor) for name, tensor in named_tensors(handle)}, given)
    else:
        check_slots(handle.optimizer, _parameters(handle.optimizer, models), given)


def write(handle: Any, shards: Iterable[Shard], models: Sequence[torch.nn.Module], placement: Placement) -> None:
    """Replace a handle's values by the shards of any mesh.

    Raises CheckpointError, before anything is changed, for missing, unknown or misshapen values.
    """
    arrays = assemble(shards)
    check(handle, {name: spec_of(tensor) for name, tensor in arrays.items()}, models)
    if isinstance(handle, torch.nn.Module):
        for name, tensor in named_tensors(handle):
            # New data for the same tensor object: optimizers and tied layers keep it, and no graph is needed to copy.
            tensor.data = placement.upload(arrays[name], tensor)
        return
    parameters = _parameters(handle.optimizer, models)
    found = by_parameter(arrays, parameters)
    capturable = {id(p) for group in handle.param_groups if group.get("capturable") for p in group["params"]}
    handle.state.clear()
    for name, parameter in parameters.items():
        on_host = () if id(parameter) in capturable else ("step",)
        if found[name]:
            handle.state[parameter] = {
                slot: placement.upload(value, parameter)
                if isinstance(value, torch.Tensor) and slot not in on_host
                else value
                for slot, value in found[name].items()
            }


def parameter_names(handle: Any, models: Sequence[torch.nn.Module]) -> list[str]:
    """What an optimizer updates, in the order in which it was given them."""
    return list(_parameters(handle.optimizer, models))


def read_gradients(module: torch.nn.Module, *, is_main: bool) -> Iterator[Shard]:
    """Accumulated gradients: global values, so one entry along the added dim 0."""
    for name, tensor in named_tensors(module):
        if tensor.grad is not None:
            for shard in _own_shards(name, tensor.grad, is_main=is_main):
                yield Shard(name, (1, *shard.global_shape), (0, *shard.offset), shard.dtype, shard.data[None])


def write_gradients(module: torch.nn.Module, shards: Iterable[Shard], placement: Placement) -> None:
    """Replace the gradients; parameters without one get None."""
    arrays = assemble(shards)
    for name, tensor in named_tensors(module):
        given = arrays.get(name)
        tensor.grad = None if given is None else placement.upload(given.to(tensor.dtype), tensor)


def _own_shards(name: str, tensor: torch.Tensor, *, is_main: bool) -> Iterator[Shard]:
    """The pieces that this process's devices are the first to hold; nothing is gathered."""
    held = spmd.wrap_if_sharded(tensor)  # an alias of a tensor that was written to has forgotten how it lies
    pieces = held.local_shards if isinstance(held, XLAShardedTensor) else []
    if not any(isinstance(piece.indices, list) for piece in pieces):
        if is_main:
            yield shard_of(name, tensor)
        return
    for piece in pieces:
        if piece.replica_id == 0:
            own = tuple(slice(0, where.stop - where.start) for where in piece.indices)  # the rest is padding
            part = shard_of(name, piece.data[own])
            offset = tuple(int(where.start) for where in piece.indices)
            yield Shard(name, tuple(tensor.shape), offset, part.dtype, part.data)


def _parameters(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """An optimizer's parameters by name."""
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = [model for model in models if any(id(parameter) in wanted for parameter in model.parameters())]
    return named_parameters(optimizer, owners)
