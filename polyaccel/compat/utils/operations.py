"""`accelerate.utils.operations`: nested batches moved, cut, joined, and brought together from all processes.

Tensors are those of torch and arrays of jax, whichever the script uses. What crosses processes goes through the Accelerator of this
process, and through the one that PartialState opens where the script makes none.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from polyaccel import jobs, trees
from polyaccel.compat.state import PartialState
from polyaccel.compat.utils.dataclasses import TensorInformation
from polyaccel.errors import CollectiveError, ConfigError
from polyaccel.metrics import is_array
from polyaccel.trees import is_namedtuple

__all__ = [
    "CannotPadNestedTensorWarning",
    "ConvertOutputsToFp32",
    "DistributedOperationException",
    "GatheredParameters",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "get_data_structure",
    "get_shape",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]


DistributedOperationException = CollectiveError


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor of torch was left as it is."""


# -- what is what ----------------------------------------------------------------------------------------------------------


def is_torch_tensor(tensor: Any) -> bool:
    """Whether this is a torch.Tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def _is_tensor(value: Any) -> bool:
    """An array that lives on a device: torch's and jax's. A numpy array is data of the script, as it is in Accelerate."""
    if is_torch_tensor(value):
        return True
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def is_tensor_information(tensor_info: Any) -> bool:
    """Whether this is a TensorInformation."""
    return isinstance(tensor_info, TensorInformation)


def find_batch_size(data: Any) -> int:
    """The length of the first array of a nested batch. Raises ValueError for an empty container, TypeError for anything else."""
    if isinstance(data, (tuple, list, Mapping)):
        if not len(data):
            raise ValueError(f"an empty {type(data).__name__} has no batch size")
        return find_batch_size(next(iter(data.values())) if isinstance(data, Mapping) else data[0])
    if not is_array(data) or not len(data.shape):
        raise TypeError(f"a {type(data).__name__} has no batch size: {data!r:.60}")
    return int(data.shape[0])


def ignorant_find_batch_size(data: Any) -> int | None:
    """`find_batch_size`, or None where there is none."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError):
        return None


def find_device(data: Any) -> Any:
    """The device of the first tensor of a nested batch, or None."""
    devices = (leaf.device for leaf in trees.flatten(data)[0] if _is_tensor(leaf))
    return next(devices, None)


def get_shape(data: Any) -> Any:
    """The batch with a list of sizes in the place of every tensor."""
    return recursively_apply(lambda tensor: list(tensor.shape), data)


def get_data_structure(data: Any) -> Any:
    """The batch with a TensorInformation in the place of every tensor."""
    return recursively_apply(lambda tensor: TensorInformation(shape=tensor.shape, dtype=tensor.dtype), data)


def initialize_tensors(data_structure: Any) -> Any:
    """The batch that `get_data_structure` described, with tensors whose values mean nothing."""
    return recursively_apply(_empty, data_structure, test_type=is_tensor_information)


def _empty(information: TensorInformation) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(information.dtype, torch.dtype):
        return torch.empty(tuple(information.shape), dtype=information.dtype)
    return sys.modules["jax"].numpy.empty(tuple(information.shape), dtype=information.dtype)


# -- leaf by leaf ----------------------------------------------------------------------------------------------------------


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """The items as a list, tuple or namedtuple like `obj`."""
    return type(obj)(*generator) if is_namedtuple(obj) else type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] | None = None,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """The nested batch with `func(leaf, *args, **kwargs)` in the place of every leaf that passes `test_type`.

    Args:
        func: is called with each leaf.
        data: nested lists, tuples, namedtuples, mappings and dataclasses; their types are kept.
        test_type: None: tensors of torch and arrays of jax.
        error_on_other_type: raise TypeError for a leaf that does not pass; otherwise it stays.
    """
    passes = _is_tensor if test_type is None else test_type

    def one(leaf: Any) -> Any:
        if passes(leaf):
            return func(leaf, *args, **kwargs)
        if isinstance(leaf, (list, tuple)):  # a subclass, which is a leaf for trees
            return honor_type(leaf, [apply(item) for item in leaf])
        if error_on_other_type:
            name = "is_torch_tensor" if test_type is None else test_type.__name__
            raise TypeError(
                f"Unsupported types ({type(leaf)}) passed to `{getattr(func, '__name__', func)}`. Only nested list/tuple/dicts of"
                f" objects that are valid for `{name}` should be passed."
            )
        return leaf

    def apply(tree: Any) -> Any:
        return one(tree) if passes(tree) else trees.map_leaves(one, tree)

    return apply(data)


def send_to_device(tensor: Any, device: Any, non_blocking: bool = False, skip_keys: Any = None) -> Any:
    """The nested batch with every tensor on `device`.

    Args:
        tensor: a tensor, anything with a method `to`, or containers of them; other values stay.
        device: a torch.device or its name; for arrays of jax a jax.Device or Sharding.
        non_blocking: do not wait for the transfer, where the device can do that.
        skip_keys: a key, or several, whose values in mappings stay where they are.
    """
    if hasattr(tensor, "to"):
        return _moved(tensor, device, non_blocking)
    if _is_tensor(tensor):
        return sys.modules["jax"].device_put(tensor, device)
    if isinstance(tensor, (list, tuple)):
        return honor_type(tensor, [send_to_device(item, device, non_blocking, skip_keys) for item in tensor])
    if isinstance(tensor, Mapping):
        skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or []
        leaf = trees.Structure(None)
        one_level = trees.Structure(type(tensor), tuple(tensor), (leaf,) * len(tensor), tensor)
        return one_level.unflatten(
            value if key in skipped else send_to_device(value, device, non_blocking, skip_keys)
            for key, value in tensor.items()
        )
    return tensor


def _moved(value: Any, device: Any, non_blocking: bool) -> Any:
    if is_torch_tensor(value):
        return value.to(device, non_blocking=non_blocking)
    try:
        return value.to(device, non_blocking=non_blocking)
    except TypeError:  # a container whose `to` takes the device alone
        return value.to(device)


def slice_tensors(
    data: Any, tensor_slice: Any, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """The nested batch with `tensor[tensor_slice]` in the place of every tensor; the last two arguments change nothing."""
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def listify(data: Any) -> Any:
    """The nested batch with (nested) lists of numbers in the place of tensors."""
    return recursively_apply(lambda tensor: tensor.tolist(), data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Nested batches of equal structure joined along `dim`, tensor by tensor; a single batch without tensors stays as it is.

    Raises TypeError where values that are no tensors would have to be joined.
    """
    first = data[0]
    if isinstance(first, (tuple, list)):
        return honor_type(first, [concatenate([batch[i] for batch in data], dim) for i in range(len(first))])
    if isinstance(first, Mapping):
        leaf = trees.Structure(None)
        one_level = trees.Structure(type(first), tuple(first), (leaf,) * len(first), first)
        return one_level.unflatten(concatenate([batch[key] for batch in data], dim) for key in first)
    if is_torch_tensor(first):
        return sys.modules["torch"].cat(list(data), dim=dim)
    if _is_tensor(first):
        return sys.modules["jax"].numpy.concatenate(list(data), axis=dim)
    if len(data) == 1:
        return first
    raise TypeError(f"concatenate joins tensors, and got a {type(first).__name__}: {first!r:.60}")


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Every tensor with its last row repeated along `dim` until `num_processes` divides the `batch_size` that it has now."""
    missing = -batch_size % num_processes

    def pad(one: Any) -> Any:
        last = one[(slice(None),) * dim + (slice(-1, None),)]
        return concatenate([one, *[last] * missing], dim)

    return recursively_apply(pad, tensor, error_on_other_type=True)


def convert_to_fp32(tensor: Any) -> Any:
    """The nested batch with its tensors of 16-bit floating point in float32."""
    if _is_half(tensor):
        return _to_fp32(tensor)
    return recursively_apply(_to_fp32, tensor, test_type=_is_half)


def _is_half(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        return False
    if hasattr(dtype, "is_floating_point"):  # torch
        return bool(dtype.is_floating_point and dtype.itemsize == 2)
    return str(dtype) in ("float16", "bfloat16")


def _to_fp32(value: Any) -> Any:
    return value.float() if hasattr(value, "float") else value.astype("float32")


class ConvertOutputsToFp32:
    """A function, such as a model's forward, whose outputs of 16-bit floating point come back in float32. It refuses to be pickled."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        functools.update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))

    def __reduce__(self) -> Any:
        raise TypeError("a forward of converted outputs cannot be pickled: unwrap the model first")


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """`model_forward` with its outputs in float32; `__wrapped__` leads back to it."""
    converted = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return converted(*args, **kwargs)

    forward.__wrapped__ = converted  # type: ignore[attr-defined]
    return forward


@contextmanager
def GatheredParameters(
    params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
) -> Generator[None]:
    """Does nothing: it is for parameters that DeepSpeed has partitioned, and there are none."""
    yield


# -- between processes -----------------------------------------------------------------------------------------------------


def _job() -> Any:
    PartialState()
    return jobs.accelerator()


def gather(tensor: Any) -> Any:
    """Every tensor concatenated along dim 0 over processes; a scalar becomes shape (num_processes,). One process: the input."""
    return _job().gather(tensor)


def gather_object(object: Any) -> Any:
    """The lists of all processes, joined in process order. One process: the input."""
    return _job().gather_object(object)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Every tensor as process `from_process` has it; torch's own tensors and parameters are overwritten and returned."""
    received = _job().broadcast(tensor, from_process)
    return tensor if received is tensor else trees.map_leaves(_overwrite, tensor, received)


def _overwrite(mine: Any, received: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is None or mine is received or type(mine) not in (torch.Tensor, torch.nn.Parameter):
        return received  # what a model on another engine gave is a value, not memory of torch
    with torch.no_grad():
        mine.copy_(received)
    return mine


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """The list of process `from_process`, written into `object_list` on all processes and returned."""
    values: list[Any] = _job().broadcast_object_list(object_list, from_process)
    return values


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Every tensor reduced over processes ("mean", "sum", "max", "min"), times `scale`; the input stays as it is."""
    job = _job()
    reduced = job.reduce(tensor, reduction, scale)
    if job.num_processes > 1 and reduction != "none":
        return reduced
    return recursively_apply(lambda one: one.clone() if is_torch_tensor(one) else one, reduced)


def copy_tensor_to_devices(tensor: Any = None) -> Any:
    """The tensor that one process has, on all of them; the others pass None and need not know its shape.

    Raises ConfigError where none or several processes pass one.
    """
    job = _job()
    mine = (
        None if tensor is None else [list(tensor.shape), str(tensor.dtype).rpartition(".")[2], is_torch_tensor(tensor)]
    )
    everyone = job.gather_object([mine])
    owners = [index for index, one in enumerate(everyone) if one is not None]
    if len(owners) != 1:
        raise ConfigError(
            f"copy_tensor_to_devices got a tensor on {len(owners)} of {len(everyone)} processes",
            "pass it on exactly one process, and None on the others",
        )
    if tensor is None:
        shape, dtype, of_torch = everyone[owners[0]]
        namespace = sys.modules["torch"] if of_torch else sys.modules["jax"].numpy
        tensor = send_to_device(namespace.zeros(tuple(shape), dtype=getattr(namespace, dtype)), job.device)
    else:
        tensor = send_to_device(tensor, job.device)
    return job.broadcast(tensor, owners[0])


class _Kept:
    """A leaf that no collective sees."""

    def __init__(self, value: Any) -> None:
        self.value = value


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Every tensor padded along `dim` with `pad_index` to the longest of all processes, at its end or, with `pad_first`, its start.

    A tensor without that dim stays; so does a nested tensor, with a CannotPadNestedTensorWarning.
    """

    def keep(leaf: Any) -> Any:
        if not getattr(leaf, "is_nested", False):
            return leaf
        warnings.warn("a nested tensor has no one length to pad; it stays", CannotPadNestedTensorWarning, stacklevel=4)
        return _Kept(leaf)

    padded = _job().pad_across_processes(trees.map_leaves(keep, tensor), dim, pad_index, pad_first)
    return trees.map_leaves(lambda leaf: leaf.value if isinstance(leaf, _Kept) else leaf, padded)
