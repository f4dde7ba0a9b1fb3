"""Batches as plain values and arrays, which the wire between processes carries, and back: tensors stay tensors, containers their types."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch

from polyaccel import trees
from polyaccel.errors import UnsupportedError

_TENSOR, _OBJECT = "$tensor", "$object"


def pack(value: Any) -> Any:
    """`value` as dicts, lists, tuples, arrays and plain values. Leaves that are none of these are for the wire to refuse."""
    if isinstance(value, torch.Tensor):
        host = value.detach().cpu().contiguous()
        data = host.reshape(-1).view(torch.uint8).numpy()
        return {_TENSOR: (str(host.dtype).removeprefix("torch."), tuple(host.shape), data)}
    kind = type(value)
    if kind in (list, tuple):
        return kind([pack(item) for item in value])
    if kind is dict:
        return {name: pack(item) for name, item in value.items()}
    items = _items(value)
    if items is None:
        return value
    return {_OBJECT: (kind.__module__, kind.__qualname__, [(name, pack(item)) for name, item in items])}


def unpack(value: Any) -> Any:
    """What `pack` got. Raises UnsupportedError for a container whose class this process has not imported."""
    kind = type(value)
    if kind in (list, tuple):
        return kind([unpack(item) for item in value])
    if kind is not dict:
        return value
    if set(value) == {_TENSOR}:
        dtype, shape, data = value[_TENSOR]
        return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
    if set(value) == {_OBJECT}:
        module, name, items = value[_OBJECT]
        return _made(_container(module, name), {key: unpack(item) for key, item in items})
    return {name: unpack(item) for name, item in value.items()}


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a namedtuple, Mapping or dataclass; None for a leaf."""
    if trees.is_namedtuple(value):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
    return None


def _container(module: str, name: str) -> Any:
    # Looked up, never imported: what comes from another process is data, and names only what the script has loaded itself.
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_container = isinstance(found, type) and (
        issubclass(found, Mapping) or hasattr(found, "_fields") or dataclasses.is_dataclass(found)
    )
    if not is_container:
        raise UnsupportedError(
            f"process 0 sends batches that are a {module}.{name}, which this process does not know",
            "import it at the top of the script, let collate_fn return a dict, or use dispatch_batches=False",
        )
    return found


def _made(kind: Any, items: dict[Any, Any]) -> Any:
    if issubclass(kind, Mapping):
        return kind(items)
    return kind(*items.values()) if hasattr(kind, "_fields") else kind(**items)
