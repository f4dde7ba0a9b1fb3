"""Model, optimizer, gradients and generators as named shards and values, and back.

Parameters are the same on all processes, so process 0 gives all of them. A module or optimizer that a bridge made may keep arrays that
are no tensors of torch's: it gives them with `read_arrays()` (numpy arrays by name) and takes them with `write_arrays(tensors)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec, Shard
from polyaccel_torch.dialect.modules import named_tensors
from polyaccel_torch.dialect.states import (
    array_shard,
    assemble,
    by_parameter,
    check_arrays,
    check_slots,
    shard_of,
    slots,
    spec_of,
)

# -- models ----------------------------------------------------------------------------------------------------------------


def read_model(module: nn.Module) -> Iterator[Shard]:
    """Parameters and persistent buffers under their names in `state_dict`, tied ones once."""
    for name, tensor in named_tensors(module):
        yield shard_of(name, tensor)
    for name, array in _arrays_beside(module).items():
        yield array_shard(name, array)


def check_model(module: nn.Module, given: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError where arrays of these names, shapes and dtypes are not this model's."""
    wanted = {name: spec_of(value) for name, value in (*named_tensors(module), *_arrays_beside(module).items())}
    check_arrays(type(module).__name__, wanted, given)


def write_model(module: nn.Module, shards: Iterable[Shard]) -> None:
    """Copy values into the module's own tensors. Raises CheckpointError, before anything changes, if they do not fit."""
    arrays = assemble(shards)
    check_model(module, {name: spec_of(tensor) for name, tensor in arrays.items()})
    beside = _arrays_beside(module)
    with torch.no_grad():
        for name, tensor in named_tensors(module):
            tensor.copy_(arrays[name])
    if beside:
        module.write_arrays({name: arrays[name] for name in beside})  # type: ignore[operator]


def _arrays_beside(module: nn.Module) -> dict[str, Any]:
    return module.read_arrays() if hasattr(module, "read_arrays") else {}  # type: ignore[operator]


# -- optimizers ------------------------------------------------------------------------------------------------------------


def read_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[Shard]:
    """The state of every parameter that has one."""
    if hasattr(optimizer, "read_arrays"):
        for name, array in optimizer.read_arrays().items():
            yield array_shard(name, array)
        return
    for name, value in slots(optimizer, parameters):
        yield shard_of(name, value)


def check_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], given: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError for state of unknown parameters, or of other shapes."""
    if hasattr(optimizer, "read_arrays"):
        held = {name: spec_of(array) for name, array in optimizer.read_arrays().items()}
        check_arrays(type(optimizer).__name__, held, given)
    else:
        check_slots(optimizer, parameters, given)


def write_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], shards: Iterable[Shard]) -> None:
    """Replace the state; hyperparameters stay. Raises CheckpointError for state of an unknown parameter."""
    arrays = assemble(shards)
    check_optimizer(optimizer, parameters, {name: spec_of(tensor) for name, tensor in arrays.items()})
    if hasattr(optimizer, "write_arrays"):
        optimizer.write_arrays(arrays)
        return
    positions = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    found = by_parameter(arrays, parameters)
    state = {positions[id(parameters[name])]: entries for name, entries in found.items() if entries}
    groups = optimizer.param_groups
    # torch's own rules place each slot: on the parameter's device, step counters where the kernels want them.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.param_groups = groups  # not its copies: user code may hold a group, or a learning rate that is a tensor
    for name, entries in found.items():
        for slot, value in entries.items():
            placed = optimizer.state[parameters[name]][slot]
            if isinstance(value, torch.Tensor) and placed.dtype != value.dtype:
                # Those rules also cast every slot to the parameter's dtype, which rounds float32 numbers beside bfloat16 parameters.
                optimizer.state[parameters[name]][slot] = value.to(placed.device)


# -- gradients -------------------------------------------------------------------------------------------------------------


def read_gradients(module: nn.Module, *, process: tuple[int, int], scale: float) -> Iterator[Shard]:
    """What this process has accumulated, divided by `scale`, as entry [0] of [1] along a new dim 0."""
    for name, tensor in named_tensors(module):
        if tensor.grad is not None:
            grad = tensor.grad
            if grad.is_sparse:
                raise CheckpointError(
                    f"the gradient of {name} is sparse and cannot be saved in the middle of an accumulation window",
                    "save after the update that closes the window, or use dense gradients",
                )
            yield shard_of(name, grad if scale == 1.0 else grad / scale, leading=process)


def write_gradients(module: nn.Module, shards: Iterable[Shard], *, scale: float) -> None:
    """Replace the gradients, times `scale`; parameters without one get None."""
    arrays = assemble(shards)
    for name, tensor in named_tensors(module):
        given = arrays.get(name)
        if given is None:
            tensor.grad = None
        else:
            value = given.to(tensor.device, tensor.dtype)
            tensor.grad = value if scale == 1.0 else value * scale
