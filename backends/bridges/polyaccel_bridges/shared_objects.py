"""Objects that modules hold in attributes and may share, a configuration for one: their plain values decide what forward does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, bytes, type(None))
_EVERY_MODULE = frozenset(vars(nn.Module()))
_OTHERS = (
    *(torch.Tensor, nn.Module, FunctionType, MethodType, BuiltinFunctionType, type, ModuleType),
    *(list, dict, set, tuple),
)


def attributes_of(key: str, value: Any) -> dict[str, Any] | None:
    """The attributes of what a module holds under `key`, where it is such an object."""
    kind = type(value)  # and not isinstance: a stand-in for a counter notices every look at it
    if key in _EVERY_MODULE or issubclass(kind, (*PLAIN, *_OTHERS)) or kind.__module__.startswith("polyaccel_bridges."):
        return None
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return own if type(own) is dict else None


def shared_objects(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A readable name and the attributes of every such object of named modules, each object once."""
    seen: set[int] = set()
    for path, module in modules:
        for key, value in module.__dict__.items():
            own = attributes_of(key, value)
            if own is not None and id(own) not in seen:
                seen.add(id(own))
                yield f"{path}.{key}" if path else key, own


class PlainValues:
    """The plain values of the shared objects of `modules` as they are now; `restore()` makes them so again."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._before = [(own, _plain(own)) for _, own in shared_objects(modules)]

    def restore(self) -> None:
        """Put back what was set or added; what is no plain value stays."""
        for own, before in self._before:
            now = _plain(own)
            if now == before and [type(v) for v in now.values()] == [type(v) for v in before.values()]:
                continue
            for key in now.keys() - before.keys():
                del own[key]
            own.update(before)


def _plain(own: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if issubclass(type(value), PLAIN)}
