"""Model and optimizer state as named shards, and back. Parameters are the same on all processes, so process 0 gives all of them.

Optimizer state is named `<parameter>.<slot>` (`layer.weight.exp_avg`). numpy has no bfloat16: such data travels as its bits in
uint16, under the dtype name "bfloat16". A module or optimizer that a bridge made may keep arrays that are no tensors of torch's: it
gives them with `read_arrays()` (numpy arrays by name) and takes them with `write_arrays(tensors)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel_torch.dialect.modules import named_tensors


def read_model(module: nn.Module) -> Iterator[Shard]:
    """Parameters and persistent buffers under their names in `state_dict`, tied ones once."""
    for name, tensor in named_tensors(module):
        yield _shard(name, tensor)
    for name, array in _arrays_beside(module).items():
        yield _array_shard(name, array)


def write_model(module: nn.Module, shards: Iterable[Shard]) -> None:
    """Copy values into the module's own tensors. Raises CheckpointError, before anything changes, if names or shapes differ."""
    arrays = assemble(shards)
    tensors = dict(named_tensors(module))
    beside = _arrays_beside(module)
    _check_names(type(module).__name__, {*tensors, *beside}, set(arrays))
    _check_shapes("model", {**tensors, **beside}, arrays)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(arrays[name])
    if beside:
        module.write_arrays({name: arrays[name] for name in beside})  # type: ignore[operator]


def read_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[Shard]:
    """The state of every parameter that has one."""
    if hasattr(optimizer, "read_arrays"):
        for name, array in optimizer.read_arrays().items():
            yield _array_shard(name, array)
        return
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, (torch.Tensor, int, float)):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r} of {name}: no array",
                    "save this optimizer with its own state_dict",
                )
            yield _shard(f"{name}.{slot}", torch.as_tensor(value))


def write_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], shards: Iterable[Shard]) -> None:
    """Replace the state; hyperparameters stay. Raises CheckpointError for state of an unknown parameter."""
    if hasattr(optimizer, "write_arrays"):
        given = assemble(shards)
        held = optimizer.read_arrays()  # type: ignore[attr-defined]
        _check_names(type(optimizer).__name__, set(held), set(given))
        _check_shapes("optimizer", held, given)
        optimizer.write_arrays(given)
        return
    positions = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for full_name, tensor in assemble(shards).items():
        name, _, slot = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint has {slot!r} of {name!r}, which {type(optimizer).__name__} does not update",
                "build the optimizer over the parameters that it was saved with",
            )
        state.setdefault(positions[id(parameters[name])], {})[slot] = tensor
    # torch's own rules place each slot: on the parameter's device and in its dtype, step counters where the kernels want them.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def assemble(shards: Iterable[Shard]) -> dict[str, torch.Tensor]:
    """Whole tensors from pieces of any mesh, by name. Raises CheckpointError if elements are missing."""
    whole: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        piece = _from_host(shard.data, shard.dtype)
        if shard.name not in whole:
            whole[shard.name] = torch.empty(shard.global_shape, dtype=piece.dtype)
            filled[shard.name] = 0
        where = tuple(slice(start, start + size) for start, size in zip(shard.offset, piece.shape, strict=True))
        whole[shard.name][where] = piece
        filled[shard.name] += piece.numel()
    for name, tensor in whole.items():
        if filled[name] < tensor.numel():
            raise CheckpointError(
                f"{name}: {filled[name]} of {tensor.numel()} elements are there", "give the shards of all processes"
            )
    return whole


def _shard(name: str, tensor: torch.Tensor) -> Shard:
    host = tensor.detach().cpu().contiguous()
    data = host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
    dtype = str(host.dtype).removeprefix("torch.")
    # A copy: training goes on while the shard is written.
    return Shard(name, tuple(host.shape), (0,) * host.dim(), dtype, data.copy())


def _array_shard(name: str, array: Any) -> Shard:
    dtype = array.dtype.name
    data = array.view(np.uint16) if dtype == "bfloat16" else array
    return Shard(name, tuple(array.shape), (0,) * array.ndim, dtype, data.copy())


def _arrays_beside(module: nn.Module) -> dict[str, Any]:
    return module.read_arrays() if hasattr(module, "read_arrays") else {}  # type: ignore[operator]


def _from_host(data: Any, dtype: str) -> torch.Tensor:
    array = np.ascontiguousarray(data).reshape(np.shape(data))
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _check_shapes(what: str, wanted: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        if tuple(value.shape) != tuple(given[name].shape):
            raise CheckpointError(
                f"{name} has shape {tuple(given[name].shape)} in the checkpoint and {tuple(value.shape)} in the {what}",
                "build the model with the settings that it was saved with",
            )


def _check_names(model: str, wanted: set[str], given: set[str]) -> None:
    problems = [
        f"{what}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("missing", wanted - given), ("unknown", given - wanted))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit {model} ({'; '.join(problems)})",
            "build the model with the settings that it was saved with",
        )
