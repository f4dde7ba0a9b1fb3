"""Models, optimizers and gradients in pieces as shards and back: a process gives what it is the first to hold, nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from polyaccel.protocols import Shard
from polyaccel_torch import state
from polyaccel_torch.dialect.modules import named_tensors
from polyaccel_torch.dialect.states import by_parameter, shard_of, slots
from polyaccel_torch.sharded import fsdp, own_gradients
from polyaccel_torch.sharded.mesh import ShardedMesh, local_of, settle
from polyaccel_torch.sharded.pieces import LocalPieces, as_like, box_of, whole_of


def _own_shards(name: str, tensor: torch.Tensor, mesh: ShardedMesh) -> Iterator[Shard]:
    """The piece, if this process is the one that saves it and it is not empty."""
    shape, offset = box_of(tensor)
    if mesh.owns(tensor) and all(shape):
        whole = shard_of(name, local_of(tensor.detach()))
        yield Shard(name, tuple(tensor.shape), offset, whole.dtype, whole.data)


# -- models ----------------------------------------------------------------------------------------------------------------


def read_model(module: nn.Module, mesh: ShardedMesh) -> Iterator[Shard]:
    """This process's part of the parameters and persistent buffers."""
    for name, tensor in named_tensors(module):
        yield from _own_shards(name, tensor, mesh)


def write_model(module: nn.Module, shards: Iterable[Shard]) -> None:
    """Copy values into the pieces. Raises CheckpointError, before anything changes, if they do not fit."""
    live = dict(named_tensors(module))
    given = LocalPieces(shards, lambda name, shape: _box(live.get(name), shape))
    state.check_model(module, given.specs)
    with torch.no_grad():
        for name, tensor in live.items():
            local_of(tensor.detach()).copy_(given.pieces[name])


def _box(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> Any:
    """That of the live tensor; the whole of what has no place here, which the check afterwards names."""
    return box_of(tensor) if tensor is not None and tuple(tensor.shape) == shape else (shape, (0,) * len(shape))


# -- optimizers ------------------------------------------------------------------------------------------------------------


def read_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], mesh: ShardedMesh) -> Iterator[Shard]:
    """This process's part of the state."""
    for name, value in slots(optimizer, parameters):
        yield from _own_shards(name, value, mesh)


def write_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], shards: Iterable[Shard]) -> None:
    """Replace the state; what has a parameter's shape is cut as the parameter is. Raises CheckpointError as `state.write_optimizer`."""
    live = dict(slots(optimizer, parameters))

    def like(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """What lies as this slot has to: itself, or its parameter where it has that shape."""
        for found in (live.get(name), parameters.get(name.rpartition(".")[0])):
            if found is not None and tuple(found.shape) == shape:
                return found
        return None

    given = LocalPieces(shards, lambda name, shape: _box(like(name, shape), shape))
    state.check_optimizer(optimizer, parameters, given.specs)
    optimizer.state.clear()
    for name, entries in by_parameter(given.pieces, parameters).items():
        for slot, value in entries.items():
            if isinstance(value, torch.Tensor):
                full_name = f"{name}.{slot}"
                pattern = like(full_name, given.specs[full_name].shape)
                # Step counters, of no dim, stay on the host, where torch's unfused optimizers make them.
                entries[slot] = value if pattern is None or not value.dim() else as_like(value, pattern)
        if entries:
            optimizer.state[parameters[name]] = entries


# -- gradients -------------------------------------------------------------------------------------------------------------


def read_gradients(module: nn.Module, mesh: ShardedMesh, *, scale: float) -> Iterator[Shard]:
    """This process's part of the gradients, divided by `scale`, with a new dim 0: one entry, or one per data shard in a window whose
    gradients have not been averaged. Every process must call it.
    """
    part = fsdp.averaging_part(module)
    if part is not None and fsdp.has_own_gradients(part):
        yield from own_gradients.read(module, part, mesh, scale=scale)
        return
    for name, tensor in named_tensors(module):
        if tensor.grad is not None:
            grad = settle(tensor)
            for shard in _own_shards(name, grad if scale == 1.0 else grad / scale, mesh):
                yield Shard(name, (1, *shard.global_shape), (0, *shard.offset), shard.dtype, shard.data[None])


def write_gradients(
    module: nn.Module, shards: Iterable[Shard], mesh: ShardedMesh, *, scale: float, are_own: bool
) -> None:
    """Replace the gradients, times `scale`; parameters without one get None. `are_own`: they are those of this process's data shard, which
    the end of the window averages; else those of the global batch."""
    part = fsdp.averaging_part(module)
    if part is not None and are_own:
        own_gradients.write(module, part, mesh, shards, scale=scale)
        return
    if part is not None:
        fsdp.drop_own_gradients(module.parameters())
    live = dict(named_tensors(module))
    given = LocalPieces(shards, lambda name, shape: _box(live.get(name), shape))
    for name, tensor in live.items():
        piece = given.pieces.get(name)
        if piece is None:
            tensor.grad = None
        else:
            value = piece.to(tensor.dtype)
            tensor.grad = as_like(value if scale == 1.0 else value * scale, tensor)


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` with whole tensors on the host, on every process. Every process must call it."""
    return {
        name: whole_of(value.detach()).cpu() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }
