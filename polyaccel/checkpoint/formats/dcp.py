"""torch.distributed.checkpoint: one state_dict, as torch's own `get_state_dict` names it, so that `dcp.load` fills one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.formats import trees
from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, Choices
from polyaccel.checkpoint.formats.meaning import EXECUTION, complete, is_optimizer, param_groups, set_param_groups
from polyaccel.errors import CheckpointError
from polyaccel.registry import load_tree_files

_INDEX = ".metadata"


def recognizes(path: Path) -> bool:
    """A folder with DCP's index."""
    return (path / _INDEX).is_file()


def read(path: Path, choices: Choices) -> Bundle:
    """Models and optimizers at the places that the user named, or at the usual ones."""
    tree = load_tree_files("dcp").read(path)
    bundle = Bundle()
    text = tree.pop(trees.BESIDE, None)
    if isinstance(text, str):
        bundle.shared, bundle.own, groups = trees.from_beside(_json(text, path), str(path))
        places: dict[str, trees.Path] = {group: (group,) for group in groups}
    else:
        places = trees.locate(tree, choices, str(path))
    for group, place in places.items():
        part = trees.subtree(tree, place)
        bundle.groups[group] = _optimizer(part) if is_optimizer(group) else _named(part)
        if is_optimizer(group) and isinstance(part, Mapping) and part.get("param_groups"):
            set_param_groups(bundle, group, part["param_groups"])
    taken = {place[0] for place in places.values() if place}
    bundle.left_behind += sorted(str(key) for key in tree if key not in taken) if taken else []
    if not isinstance(text, str):
        complete(bundle, "dcp")
    return bundle


def write(path: Path, bundle: Bundle) -> None:
    """Everything: what DCP's users know by a name under that name, all else as JSON under `polyaccel`."""
    tree: dict[str, Any] = {}
    for group, arrays in bundle.groups.items():
        if not is_optimizer(group):
            tree[group] = dict(arrays)
            continue
        tree[group] = {"state": {}}
        for name, array in arrays.items():
            parameter, slot = trees.split_slot(name, bundle.parameters)
            if parameter is None:
                tree[group].setdefault("shared", {})[name] = array
            else:
                tree[group]["state"].setdefault(parameter, {})[slot] = array
        groups = param_groups(bundle, group)
        if groups is not None:
            tree[group]["param_groups"] = [{**EXECUTION, **one} for one in groups]
    tree[trees.BESIDE] = json.dumps(trees.beside(bundle))
    load_tree_files("dcp").write(path, tree)


def _named(part: Any) -> Arrays:
    return {".".join(path): array for path, array in trees.arrays_of(part).items()}


def _optimizer(part: Any) -> Arrays:
    """`state.<parameter>.<slot>`, nested or (torch's flattened form) in one name."""
    if not isinstance(part, Mapping):
        return {}
    found: Arrays = dict(part.get("shared", {}))
    for path, array in trees.arrays_of(
        {key: value for key, value in part.items() if key not in ("shared", "param_groups")}
    ).items():
        name = ".".join(path)
        if not name.startswith("state."):
            raise CheckpointError(
                f"an optimizer's state has {name!r}, which is not state.<parameter>.<slot>", "leave it out with --only"
            )
        found[name.removeprefix("state.")] = array
    return found


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: what stands under {trees.BESIDE!r} is no JSON: {error}", "take another copy of it"
        ) from error
