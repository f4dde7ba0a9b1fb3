"""The leaves of a batch of a flax script: arrays, lists of plain values with an entry for each sample, and what is neither."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from polyaccel import trees
from polyaccel.errors import PrepareError

Leaves = list[Any]


@dataclass(frozen=True, slots=True)
class Structure:
    """The containers of a batch, comparable; `container` is a neutral one's structure, jax's for a registered class, None for a leaf."""

    container: Any = None
    children: tuple[Structure, ...] = ()

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The batch with these leaves, in the order in which `flatten` gave them."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.container is None:
            return next(leaves)
        children = [child._build(leaves) for child in self.children]
        return self.container.unflatten(children)


_LEAF = Structure()


def flatten(batch: Any) -> tuple[Leaves, Structure]:
    """The leaves of a batch, depth first, and the structure that rebuilds it.

    Containers are those of `polyaccel.trees` and the classes that are registered with jax as pytree nodes; a list of values that
    are no arrays and no containers is a leaf.
    """
    leaves: Leaves = []
    return leaves, _flatten(batch, leaves)


def _flatten(value: Any, leaves: Leaves) -> Structure:
    if not is_array(value) and not _is_column(value):
        opened = trees.opened(value)
        if opened is not None:
            return Structure(opened[1], tuple([_flatten(child, leaves) for child in opened[0]]))
        if value is not None and not jax.tree_util.all_leaves([value]):
            children, definition = jax.tree.flatten(value, is_leaf=lambda node: node is not value)
            return Structure(definition, tuple([_flatten(child, leaves) for child in children]))
    leaves.append(value)
    return _LEAF


def _is_column(value: Any) -> bool:
    return type(value) is list and not any(
        is_array(item) or isinstance(item, (list, tuple, dict)) or trees.opened(item) is not None for item in value
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of any framework and dtype."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_placeable(leaf: Any) -> bool:
    """Whether a leaf can be put on a device: an array of numbers, no text."""
    if not is_array(leaf):
        return False
    return not isinstance(leaf.dtype, np.dtype) or leaf.dtype.kind in "biufcV"


def carries(leaf: Any, size: int) -> bool:
    """Whether a leaf has a row for each of `size` samples."""
    if isinstance(leaf, list):
        return len(leaf) == size
    return is_array(leaf) and len(leaf.shape) > 0 and leaf.shape[0] == size


def num_samples(leaves: Leaves) -> int:
    """Dim 0 of the first array that has one. Raises PrepareError without one."""
    for leaf in leaves:
        if is_array(leaf) and len(leaf.shape):
            return int(leaf.shape[0])
    raise PrepareError(
        "a batch of the loader has no array with a dim", "yield trees of arrays whose dim 0 is the batch"
    )
