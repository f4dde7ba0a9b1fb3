"""Orbax: one PyTree, nested as flax and optax nest it, so that a flax program restores it into its own trees."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.dtypes import STORED, empty
from polyaccel.checkpoint.formats import trees
from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, Choices
from polyaccel.checkpoint.formats.meaning import complete, is_optimizer, parameters_of
from polyaccel.errors import CheckpointError
from polyaccel.registry import load_tree_files
from polyaccel.stored import StoredArray

_EXTRA = "custom_metadata"  # what `TreeFiles` of Orbax calls the JSON beside the tree
_EMPTY = "without_elements"
_VALUE = "value"  # the last part of a path where an nnx.State was saved as it is


def recognizes(path: Path) -> bool:
    """A folder with Orbax's description of a PyTree, or of a step whose items have one."""
    return (path / "_METADATA").is_file() or bool(list(path.glob("*/_METADATA")))


def read(path: Path, choices: Choices) -> Bundle:
    """Models and optimizers at the places that the user named, or at the usual ones."""
    tree = load_tree_files("orbax").read(path)
    bundle = Bundle()
    extra = tree.pop(_EXTRA, None) or {}
    if trees.BESIDE in extra:
        bundle.shared, bundle.own, groups = trees.from_beside(extra[trees.BESIDE], str(path))
        places: dict[str, trees.Path] = {group: (group,) for group in groups}
    else:
        places = trees.locate(tree, choices, str(path))
    found = {group: _unwrapped(trees.arrays_of(trees.subtree(tree, place))) for group, place in places.items()}
    for group, arrays in found.items():
        if not is_optimizer(group):
            bundle.groups[group] = {".".join(place): array for place, array in arrays.items()}
    parameters = parameters_of(bundle)
    for group, arrays in found.items():
        if is_optimizer(group):
            bundle.groups[group] = {trees.optimizer_name(place, parameters): array for place, array in arrays.items()}
    bundle.groups = {group: bundle.groups[group] for group in places}
    _put_empty(bundle, extra.get(trees.BESIDE, {}).get(_EMPTY, {}), path)
    taken = {place[0] for place in places.values() if place}
    bundle.left_behind += sorted(str(key) for key in tree if key not in taken) if taken else []
    if trees.BESIDE not in extra:
        complete(bundle, "orbax")
    return bundle


def write(path: Path, bundle: Bundle) -> None:
    """Everything: arrays nested, plain values as Orbax's custom metadata."""
    tree, without_elements = {}, {}
    for group, arrays in bundle.groups.items():
        held = {name: array for name, array in arrays.items() if prod(array.shape)}
        tree[group] = trees.nested(_placed(group, held, bundle))
        # Orbax refuses them; where they stood among the others is kept too.
        without_elements[group] = [
            [n, a.dtype, list(a.shape), i] for i, (n, a) in enumerate(arrays.items()) if n not in held
        ]
    text = {**trees.beside(bundle), _EMPTY: {group: items for group, items in without_elements.items() if items}}
    load_tree_files("orbax").write(path, {**tree, _EXTRA: {trees.BESIDE: text}})


def _put_empty(bundle: Bundle, groups: Any, path: Path) -> None:
    try:
        for group, items in groups.items():
            for name, dtype, shape, position in items:
                _insert(bundle.groups[group], position, str(name), _empty(dtype, tuple(map(int, shape))))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: what stands under {trees.BESIDE!r} is damaged: {error}", "take another copy of it"
        ) from error


def _empty(dtype: str, shape: tuple[int, ...]) -> StoredArray:
    if dtype not in STORED or 0 not in shape:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} is said to have no elements")
    return StoredArray(dtype, shape, lambda: empty(dtype, shape))


def _insert(arrays: Arrays, position: int, name: str, array: StoredArray) -> None:
    items = list(arrays.items())
    items.insert(position, (name, array))
    arrays.clear()
    arrays.update(items)


def _placed(group: str, arrays: Arrays, bundle: Bundle) -> dict[trees.Path, StoredArray]:
    if not is_optimizer(group):
        places = {name: tuple(name.split(".")) for name in arrays}
        return trees.rename(arrays, places, {place: ".".join(place) for place in places.values()})
    places = {name: trees.optimizer_path(name, bundle.parameters) for name in arrays}
    return trees.rename(
        arrays, places, {place: trees.optimizer_name(place, bundle.parameters) for place in places.values()}
    )


def _unwrapped(arrays: dict[trees.Path, StoredArray]) -> dict[trees.Path, StoredArray]:
    """Without the part that nnx's variables put at the end of every path."""
    if arrays and all(len(path) > 1 and path[-1] == _VALUE for path in arrays):
        return {path[:-1]: array for path, array in arrays.items()}
    return arrays
