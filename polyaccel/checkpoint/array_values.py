"""Arrays inside plain values (a scheduler's, an EMA's): taken out into a group of arrays on the way in, put back in their own kind on the
way out. Frameworks are used where the value belongs to one, and imported nowhere.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard

_MARK = "$array"


def take_arrays(value: Any, where: str, into: list[Shard]) -> Any:
    """`value` with every array replaced by a note of its kind; the arrays, copied to the host, are appended to `into`.

    torch tensors, jax arrays and numpy arrays are known. What is neither an array nor a container stays for the checkpoint to judge.
    `where` begins the arrays' names.
    """
    if type(value) in (dict, OrderedDict):
        return {key: take_arrays(item, f"{where}.{key}", into) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(take_arrays(item, f"{where}.{index}", into) for index, item in enumerate(value))
    kind = _kind(value)
    if kind is None:
        return value
    dtype, data = _to_host(value, kind, where)
    name = where.removeprefix(".")
    into.append(Shard(name, tuple(data.shape), (0,) * data.ndim, dtype, data))
    return {_MARK: name, "kind": kind}


def put_arrays(value: Any, arrays: Mapping[str, Shard]) -> Any:
    """The value that `take_arrays` was given. Raises CheckpointError where an array is missing."""
    if type(value) is dict:
        if set(value) == {_MARK, "kind"}:
            found = arrays.get(value[_MARK])
            if found is None:
                raise CheckpointError(f"the checkpoint lacks the array {value[_MARK]!r}", "load another checkpoint")
            return _from_host(found, value["kind"])
        return {key: put_arrays(item, arrays) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(put_arrays(item, arrays) for item in value)
    return value


def array_names(value: Any) -> Iterable[str]:
    """Names of the arrays that `put_arrays` will ask for."""
    if isinstance(value, dict):
        if set(value) == {_MARK, "kind"}:
            yield value[_MARK]
            return
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from array_names(item)


def _kind(value: Any) -> str | None:
    for kind, attribute in (("torch", "Tensor"), ("jax", "Array"), ("numpy", "ndarray")):
        module = sys.modules.get(kind)
        if module is not None and isinstance(value, getattr(module, attribute)):
            return kind
    return None


def _to_host(value: Any, kind: str, where: str) -> tuple[str, Any]:
    import numpy as np

    if kind == "torch":
        torch = sys.modules["torch"]
        host = value.detach().cpu().contiguous()
        dtype = str(host.dtype).removeprefix("torch.")
        try:
            data = host.numpy()
        except TypeError:  # numpy has no such dtype
            data = host.view({1: torch.uint8, 2: torch.uint16}[host.element_size()]).numpy()
        return dtype, data.copy()
    try:
        data = np.array(value)
    except TypeError:
        raise CheckpointError(
            f"{where} holds jax random keys, which are no plain array", "save jax.random.key_data(key)"
        ) from None
    if data.dtype.hasobject:
        raise CheckpointError(f"{where} is an array of Python objects", "save a list of plain values")
    return data.dtype.name, data


def _from_host(shard: Shard, kind: str) -> Any:
    data, dtype = shard.data, shard.dtype
    if kind == "torch":
        torch = sys.modules.get("torch")
        if torch is None:
            raise CheckpointError(
                f"{shard.name} is a torch tensor, and torch is not loaded here", "import torch before load_state"
            )
        tensor = torch.from_numpy(data)
        wanted = getattr(torch, dtype)
        return tensor if tensor.dtype == wanted else tensor.view(wanted)
    if data.dtype.name != dtype:
        import ml_dtypes

        data = data.view(getattr(ml_dtypes, dtype))
    if kind == "jax" and "jax" in sys.modules:
        return sys.modules["jax"].numpy.asarray(data)
    return data
