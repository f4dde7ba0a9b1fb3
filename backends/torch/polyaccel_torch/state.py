"""Model and optimizer state as named shards, and back. Parameters are the same on all processes, so process 0 gives all of them.

Optimizer state is named `<parameter>.<slot>` (`layer.weight.exp_avg`). numpy has no bfloat16: such data travels as its bits in
uint16, under the dtype name "bfloat16".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def write_model(module: nn.Module, shards: Iterable[Shard]) -> None:
    """Copy values into the module's own tensors. Raises CheckpointError, before anything changes, if names or shapes differ."""
    arrays = assemble(shards)
    tensors = dict(named_tensors(module))
    _check_names(type(module).__name__, set(tensors), set(arrays))
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(arrays[name].shape):
            raise CheckpointError(
                f"{name} has shape {tuple(arrays[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model",
                "build the model with the settings that it was saved with",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(arrays[name])


def read_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[Shard]:
    """The state of every parameter that has one."""
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


def _from_host(data: Any, dtype: str) -> torch.Tensor:
    array = np.ascontiguousarray(data).reshape(np.shape(data))
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


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
