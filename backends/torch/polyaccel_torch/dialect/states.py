"""torch tensors as shards and back, and the state of torch optimizers by parameter and slot, for every engine that runs torch.

An optimizer's state is named `<parameter>.<slot>` (`layer.weight.exp_avg`). numpy has no bfloat16 and no float8: such data travels as
its bits, under torch's name of the dtype. Numbers that an optimizer keeps as Python numbers are arrays of no dim, of dtype int64 or
float64; torch's own step counters, which are float32 tensors, stay tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec, Shard

_BITS = {1: torch.uint8, 2: torch.uint16}
_SETTINGS = "build the model with the settings that it was saved with"


def dtype_name(dtype: torch.dtype) -> str:
    """numpy's name of a dtype, where it has one."""
    return str(dtype).removeprefix("torch.")


def spec_of(tensor: Any) -> ArraySpec:
    """Shape and dtype of a tensor or numpy array."""
    name = dtype_name(tensor.dtype) if isinstance(tensor, torch.Tensor) else tensor.dtype.name
    return ArraySpec(tuple(tensor.shape), name)


def shard_of(name: str, tensor: torch.Tensor, *, leading: tuple[int, int] | None = None) -> Shard:
    """A whole tensor as a shard with memory of its own. `leading`: it is entry [0] of an array with [1] of them along dim 0."""
    detached = tensor.detach()
    host = detached.cpu().contiguous()
    data = _to_numpy(host)
    if host.data_ptr() == detached.data_ptr():
        data = data.copy()  # training goes on while the shard is written
    shape, offset = tuple(host.shape), (0,) * host.dim()
    if leading is not None:
        data, shape, offset = data[None], (leading[1], *shape), (leading[0], *offset)
    return Shard(name, shape, offset, dtype_name(host.dtype), data)


def array_shard(name: str, array: Any) -> Shard:
    """A numpy array as a shard with memory of its own."""
    dtype = array.dtype.name
    data = array.view(np.uint16) if dtype == "bfloat16" else array
    return Shard(name, tuple(array.shape), (0,) * array.ndim, dtype, data.copy())


def assemble(shards: Iterable[Shard]) -> dict[str, torch.Tensor]:
    """Whole host tensors from pieces of any mesh, by name. Raises CheckpointError if elements are missing."""
    whole: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        piece = tensor_of(shard.data, shard.dtype)
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


def check_arrays(what: str, wanted: Mapping[str, ArraySpec], given: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError, naming `what` and the first differences, unless names, shapes and dtypes are the same."""
    problems = [
        f"{word}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for word, names in (("missing", set(wanted) - set(given)), ("unknown", set(given) - set(wanted)))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {what} ({'; '.join(problems)})", _SETTINGS)
    for name, spec in wanted.items():
        if tuple(given[name].shape) != tuple(spec.shape):
            raise CheckpointError(
                f"{name} has shape {tuple(given[name].shape)} in the checkpoint and {tuple(spec.shape)} in {what}",
                _SETTINGS,
            )
        if given[name].dtype != spec.dtype:
            raise CheckpointError(
                f"{name} is {given[name].dtype} in the checkpoint and {spec.dtype} in {what}",
                "build the model in the dtype that it was saved in, and convert it after loading",
            )


# -- optimizers ------------------------------------------------------------------------------------------------------------


def slots(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """`<parameter>.<slot>` and value of everything that the optimizer remembers. Raises CheckpointError for what is no array."""
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum keeps such an entry
                continue
            if isinstance(value, bool) or not isinstance(value, (torch.Tensor, int, float)):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r} of {name}: no array",
                    "save this optimizer with its own state_dict",
                )
            if isinstance(value, torch.Tensor):
                yield f"{name}.{slot}", value
            else:
                yield (
                    f"{name}.{slot}",
                    torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64),
                )


def check_slots(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], given: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError for slots of unknown parameters, and for slots of another shape than the live ones'."""
    live = {name: spec_of(value) for name, value in slots(optimizer, parameters)}
    for full_name, spec in given.items():
        name, _, slot = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint has {slot!r} of {name!r}, which {type(optimizer).__name__} does not update",
                "build the optimizer over the parameters that it was saved with",
            )
        if full_name in live and tuple(live[full_name].shape) != tuple(spec.shape):
            raise CheckpointError(
                f"{slot!r} of {name!r} has shape {tuple(spec.shape)} in the checkpoint and {tuple(live[full_name].shape)} in"
                f" {type(optimizer).__name__}",
                _SETTINGS,
            )


def by_parameter(
    arrays: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """The slots of each parameter, as an optimizer keeps them: Python numbers where it had such."""
    found: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for full_name, tensor in arrays.items():
        name, _, slot = full_name.rpartition(".")
        is_number = not tensor.dim() and (
            tensor.dtype == torch.int64 or (tensor.dtype == torch.float64 and slot != "step")
        )
        found[name][slot] = tensor.item() if is_number else tensor
    return found


# -- numpy -----------------------------------------------------------------------------------------------------------------


def _to_numpy(host: torch.Tensor) -> Any:
    try:
        return host.numpy()
    except TypeError:  # numpy has no such dtype
        return host.view(_BITS[host.element_size()]).numpy()


def tensor_of(data: Any, dtype: str) -> torch.Tensor:
    """A host tensor with memory of its own from a numpy array that holds this dtype, or its bits."""
    array = np.ascontiguousarray(data).reshape(np.shape(data))
    wanted = getattr(torch, dtype)
    if array.dtype.name == dtype and array.dtype.kind in "biufc":
        return torch.from_numpy(array.copy())
    bits = array.view(np.dtype(f"uint{8 * array.dtype.itemsize}"))
    return torch.from_numpy(bits.copy()).view(wanted)
