"""Names of arrays and places in a tree, for formats that hold one tree (torch DCP, Orbax): which part is the model, which the optimizer.

    DCP     model: {name: array}             optimizer: {state: {parameter: {slot: array}}, param_groups: [...]}
    Orbax   model: {part: {part: array}}     optimizer: {place in the state: {part: {part: array}}}

What such a tree has no words for stands beside it as JSON under `polyaccel`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, Choices
from polyaccel.checkpoint.values import pack, unpack
from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredArray

BESIDE = "polyaccel"
Path = tuple[str, ...]

# What other people call them; the first that is there is taken.
_USUAL: dict[str, tuple[Path, ...]] = {
    "model": (("model",), ("params",), ("state_dict",), ("app", "model")),
    "optimizer": (("optimizer",), ("optim",), ("opt_state",), ("app", "optimizer"), ("app", "optim")),
}


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every array and plain value of a tree with its path; items of a list are numbered."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)) and any(
        isinstance(item, (Mapping, list, tuple, StoredArray)) for item in tree
    ):
        for position, value in enumerate(tree):
            yield from leaves(value, (*path, str(position)))
    else:
        yield path, tree


def arrays_of(tree: Any) -> dict[Path, StoredArray]:
    """The arrays of a tree by path."""
    return {path: value for path, value in leaves(tree) if isinstance(value, StoredArray)}


def subtree(tree: Any, path: Path) -> Any:
    """What stands at a path, None where nothing does."""
    for part in path:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, (list, tuple)) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def nested(arrays: Mapping[Path, StoredArray]) -> dict[str, Any]:
    """A tree of these arrays. Raises CheckpointError where one path goes through another one's array."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        inside = tree
        for part in path[:-1]:
            inside = inside.setdefault(part, {})
            if isinstance(inside, StoredArray):
                raise CheckpointError(
                    f"{'.'.join(path)} and a part of its name are both arrays", "leave the group out with --only"
                )
        if path[-1] in inside:
            raise CheckpointError(
                f"{'.'.join(path)} and a part of its name are both arrays", "leave the group out with --only"
            )
        inside[path[-1]] = array
    return tree


def locate(tree: Any, choices: Choices, where: str) -> dict[str, Path]:
    """The path of every group: what the user said, else the usual names; a tree without any of these is a model.

    Raises CheckpointError for a path of the user's that is not there.
    """
    for group, path in choices.places.items():
        if subtree(tree, path) is None:
            raise CheckpointError(
                f"{where} has nothing at {'.'.join(path)!r}, where --map puts {group}",
                f"it has {', '.join(sorted(map(str, tree))[:20])}",
            )
    if choices.places:
        return dict(choices.places)
    found = {}
    for group, candidates in _USUAL.items():
        there = [path for path in candidates if arrays_of(subtree(tree, path))]
        if there:
            found[group] = there[0]
    return found or {"model": ()}


def beside(bundle: Bundle, without: Collection[str] = ()) -> dict[str, Any]:
    """The plain values of a bundle as JSON, without these shared ones."""
    shared = {name: value for name, value in bundle.shared.items() if name not in without}
    return {
        "shared": pack(shared, "shared"),
        "own": [pack(values, "own") for values in bundle.own],
        "groups": list(bundle.groups),
    }


def from_beside(text: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(shared, own, groups) that `beside` made. Raises CheckpointError for anything else."""
    try:
        shared, own = unpack(text["shared"]), [unpack(values) for values in text["own"]]
        groups = [str(group) for group in text["groups"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: what stands under {BESIDE!r} is damaged: {error}", "take another copy of it"
        ) from error
    return shared, own, groups


# -- names of an optimizer's arrays ---------------------------------------------------------------------------------------------


def split_slot(name: str, parameters: Collection[str]) -> tuple[str | None, str]:
    """`layer.weight.exp_avg` -> (`layer.weight`, `exp_avg`); (None, name) for what belongs to no parameter (`0/count`)."""
    parameter, _, slot = name.rpartition(".")
    return (parameter, slot) if parameter in parameters else (None, name)


def optimizer_path(name: str, parameters: Collection[str]) -> Path:
    """`head.kernel.0/mu` -> (0, mu, head, kernel): as optax nests its state; `0/count` -> (0, count)."""
    parameter, slot = split_slot(name, parameters)
    return (*slot.split("/"), *(parameter.split(".") if parameter else ()))


def optimizer_name(path: Path, parameters: Collection[str]) -> str:
    """The name that `optimizer_path` took apart: the longest end of the path that is a parameter is its owner."""
    for start in range(len(path)):
        owner = ".".join(path[start:])
        if owner in parameters:
            return f"{owner}.{'/'.join(path[:start]) or 'state'}"
    return "/".join(path)


def rename(arrays: Arrays, names: Mapping[str, Path], back: Mapping[Path, str]) -> dict[Path, StoredArray]:
    """The arrays by path. Raises CheckpointError for a name that would come back as another one."""
    for name, path in names.items():
        if back.get(path) != name:
            raise CheckpointError(
                f"{name!r} would come back from this format as {back.get(path)!r}", "leave its group out with --only"
            )
    return {names[name]: array for name, array in arrays.items()}
