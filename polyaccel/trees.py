"""Nested batches of any container, flattened and rebuilt without a framework.

Containers: list, tuple, namedtuple, any Mapping, dataclass instances. Everything else is a leaf. A rebuilt container has the
type of the original; a Mapping or dataclass is rebuilt from its items, so a subclass that adds state to them keeps it by copy.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """The containers of a flattened tree: hashable, comparable by shape of the tree, able to rebuild it."""

    kind: type | None  # None: a leaf
    keys: tuple[Hashable, ...] = ()
    children: tuple[Structure, ...] = ()
    template: Any = dataclasses.field(default=None, compare=False, hash=False)

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """The tree with these leaves, in the order in which `flatten` gave them."""
        return self._build(iter(leaves))

    def _build(self, leaves: Any) -> Any:
        if self.kind is None:
            return next(leaves)
        children = [child._build(leaves) for child in self.children]
        if self.kind in (list, tuple):
            return self.kind(children)
        if self.kind is dict:
            return dict(zip(self.keys, children, strict=True))
        if issubclass(self.kind, tuple):  # a namedtuple
            return self.kind(*children)
        items = dict(zip(self.keys, children, strict=True))
        if issubclass(self.kind, Mapping):
            return _rebuild_mapping(self.template, items)
        return dataclasses.replace(self.template, **{str(name): value for name, value in items.items()})


_LEAF = Structure(None)


def _rebuild_mapping(template: Any, items: dict[Any, Any]) -> Any:
    if not isinstance(template, MutableMapping):
        return type(template)(items)
    rebuilt: Any = copy.copy(template)  # a shallow copy keeps what a subclass holds beside its items
    if isinstance(template, UserDict):
        rebuilt.data = {}  # its shallow copy may share the dict
    for name, value in items.items():
        rebuilt[name] = value
    return rebuilt


def is_namedtuple(value: Any) -> bool:
    """True for an instance of a namedtuple class."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree, depth first, and the structure that rebuilds it."""
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[Any]) -> Structure:
    contents = _contents(tree)
    if contents is None:
        leaves.append(tree)
        return _LEAF
    keys, values, template = contents
    return Structure(type(tree), keys, tuple([_flatten(value, leaves) for value in values]), template)


def _contents(tree: Any) -> tuple[tuple[Hashable, ...], Iterable[Any], Any] | None:
    """Names, values and template of a container; None for a leaf."""
    kind = type(tree)
    if kind is list or kind is tuple or is_namedtuple(tree):
        return (), tree, None
    if isinstance(tree, Mapping):
        return tuple(tree), [tree[name] for name in tree], tree if kind is not dict else None
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = tuple([field.name for field in dataclasses.fields(tree) if field.init])
        return names, [getattr(tree, name) for name in names], tree
    return None


def opened(tree: Any) -> tuple[list[Any], Structure] | None:
    """The values directly inside a container, and the structure that rebuilds it from as many others; None for a leaf."""
    contents = _contents(tree)
    if contents is None:
        return None
    keys, values, template = contents
    held = list(values)
    return held, Structure(type(tree), keys, (_LEAF,) * len(held), template)


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree with `function` applied to every leaf (and to the same leaf of `others`, trees of the same structure)."""
    leaves, structure = flatten(tree)
    rest = [flatten(other)[0] for other in others]
    return structure.unflatten([function(*row) for row in zip(leaves, *rest, strict=True)])
