"""Arguments as a hashable key and a list of leaves: equal keys mean equal containers and static values, and tensors in the same places.

Tensors never enter a key as values. What a key holds strongly (functions, unknown objects) is compared by identity.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, final

import numpy as np
import torch

from polyaccel import trees

Key = Hashable

_PLAIN: Final = frozenset({int, str, type(None)})
# Values that are compared by ==, with their type.
_BY_VALUE: Final = (
    bool,
    int,
    float,
    np.generic,
    bytes,
    complex,
    range,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
    torch.layout,
    enum.Enum,
    type(...),
    type,
)


_WITHOUT_STATE: Final = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


@final
class Mark:
    """The first item of a tuple in a key: what the rest of the tuple is."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


LEAF: Final = Mark("leaf")  # (LEAF, index, ...): the rest is the packer's own description of a tensor
_TUPLE: Final = Mark("tuple")
_LIST: Final = Mark("list")
_DICT: Final = Mark("dict")
_SLICE: Final = Mark("slice")
_TREE: Final = Mark("tree")
_NAMED: Final = Mark("named")  # what torch.max and its kin return: tuples of a class of their own
_VALUE: Final = Mark("value")
_OBJECT: Final = Mark("object")


@final
class Identity:
    """Any object, compared by identity and kept alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is Identity and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


Describe = Callable[[Any], Key]  # a tensor (or whatever `wanted` says) -> its part of the key


def freeze(value: Any, tensor: Describe, number: Describe | None = None, other: Describe | None = None) -> Key:
    """The key of `value`. `tensor` describes tensors; `number` floats; `other` everything else that is no container.

    Without `number` and `other` these values are part of the key.
    """
    kind = type(value)
    if value is None or (other is None and kind in _PLAIN):
        return value
    if kind is float and number is not None:
        return number(value)
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if kind is tuple:
        return (_TUPLE, *[freeze(item, tensor, number, other) for item in value])
    if kind is list:
        return (_LIST, *[freeze(item, tensor, number, other) for item in value])
    if kind is dict:
        return (_DICT, tuple(value), *[freeze(item, tensor, number, other) for item in value.values()])
    if kind is slice:
        return (_SLICE, *[freeze(item, tensor, number, other) for item in (value.start, value.stop, value.step)])
    if isinstance(value, tuple) and kind.__module__ == "torch.return_types":
        return (_NAMED, Identity(kind), *[freeze(item, tensor, number, other) for item in value])
    if isinstance(value, torch.nn.Module):
        return (_OBJECT, Identity(value))
    if isinstance(value, _BY_VALUE):
        return (_VALUE, kind, value) if other is None else other(value)
    leaves, structure = trees.flatten(value)
    if structure.kind is not None:
        return (_TREE, structure, *[freeze(leaf, tensor, number, other) for leaf in leaves])
    if other is not None:
        return other(value)
    return value if kind in _PLAIN else (_OBJECT, Identity(value), *_attributes(value))


def _attributes(value: Any) -> list[Key]:
    """What an object's own attributes are now: the object itself is compared by identity, and they may be written to."""
    if isinstance(value, _WITHOUT_STATE) or not hasattr(value, "__dict__"):
        return []
    found: list[Key] = []
    for name, item in vars(value).items():
        if item is None or isinstance(item, bool | int | float | str | complex):
            found.append((name, type(item), repr(item)))
        elif isinstance(item, torch.Tensor):
            found.append((name, Identity(item), 0 if item.is_inference() else item._version))
        elif isinstance(item, list | tuple | dict | set) and not any(
            isinstance(one, torch.Tensor) for one in leaves_of(item)
        ):
            found.append((name, type(item), repr(item)))
        else:
            found.append((name, Identity(item)))
    return found


def freeze_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Describe, number: Describe, *, lifts: bool
) -> Key:
    """The key of `(args, kwargs)`. With `lifts`, integers and numpy's scalars among the arguments are numbers too."""

    def one(value: Any) -> Key:
        if lifts and type(value) is int:
            return number(value)
        if lifts and isinstance(value, np.floating | np.integer):
            return number(value.item())
        return freeze(value, tensor, number)

    return (
        _TUPLE,
        (_TUPLE, *[one(value) for value in args]),
        (_DICT, tuple(kwargs), *[one(value) for value in kwargs.values()]),
    )


def settle(key: Any) -> Any:
    """The same key without references to the values of the containers that it was made from."""
    if type(key) is not tuple:
        return key
    if key and key[0] is _TREE:
        structure: trees.Structure = key[1]
        _, bare = trees.flatten(structure.unflatten([None] * (len(key) - 2)))
        return (_TREE, bare, *[settle(item) for item in key[2:]])
    return tuple(settle(item) for item in key)


def thaw(key: Any, leaf: Callable[[tuple[Any, ...]], Any]) -> Any:
    """The value behind `key`, with `leaf(described)` in place of what the packer described."""
    if type(key) is not tuple:
        return key
    mark = key[0]
    if mark is LEAF:
        return leaf(key)
    if mark is _TUPLE:
        return tuple([thaw(item, leaf) for item in key[1:]])
    if mark is _LIST:
        return [thaw(item, leaf) for item in key[1:]]
    if mark is _DICT:
        return dict(zip(key[1], [thaw(item, leaf) for item in key[2:]], strict=True))
    if mark is _SLICE:
        return slice(*[thaw(item, leaf) for item in key[1:]])
    if mark is _TREE:
        return key[1].unflatten([thaw(item, leaf) for item in key[2:]])
    if mark is _NAMED:
        return key[1].value([thaw(item, leaf) for item in key[2:]])
    if mark is _VALUE:
        return key[2]
    return key[1].value


def described(key: Any) -> list[tuple[Any, ...]]:
    """Every description in a key, in order."""
    found: list[tuple[Any, ...]] = []
    thaw(key, found.append)
    return found


def leaves_of(value: Any) -> list[Any]:
    """Everything in nested containers that is no container."""
    return trees.flatten(value)[0]


def names_of_leaves(value: Any, prefix: str) -> list[str]:
    """A readable path for every leaf, in the order of `leaves_of`."""
    if isinstance(value, Mapping):
        return [name for key, item in value.items() for name in names_of_leaves(item, f"{prefix}[{key!r}]")]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and type(value) in (list, tuple):
        return [name for index, item in enumerate(value) for name in names_of_leaves(item, f"{prefix}[{index}]")]
    return [prefix] * len(leaves_of(value))
