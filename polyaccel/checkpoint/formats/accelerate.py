"""The folder that Accelerate's `save_state` writes: a model in safetensors, all else in files of torch.save, optimizer state by position.

Which parameter stands at which position is in none of these files. It is taken from `param_names` where torch has kept them, from the
user, or from `parameter_names.json`, which `write` puts beside them; never guessed.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.documents import Malformed, strict_json
from polyaccel.checkpoint.formats import trees
from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, Choices, models_of, numbered
from polyaccel.checkpoint.formats.huggingface import write_tensors
from polyaccel.checkpoint.formats.mapped import read_tensors
from polyaccel.checkpoint.formats.meaning import (
    complete,
    param_groups,
    set_param_groups,
    set_values,
    slot_array,
    slot_value,
    values_of,
)
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.errors import CheckpointError
from polyaccel.precision import LossScaling
from polyaccel.registry import load_tree_files
from polyaccel.stored import Spool, StoredArray, TreeFiles

NAMES = "parameter_names.json"
_RANDOM = re.compile(r"random_states_(\d+)\.pkl")
_FILE = re.compile(
    r"(?P<kind>model|pytorch_model|optimizer|scheduler|custom_checkpoint)(?:_(?P<index>\d+))?\.(?P<end>safetensors|bin|pkl)"
)
_ENDS = {
    "model": "safetensors",
    "pytorch_model": "bin",
    "optimizer": "bin",
    "scheduler": "bin",
    "custom_checkpoint": "pkl",
}


def recognizes(path: Path) -> bool:
    """A folder with a file that only Accelerate writes."""
    return any(path.glob("random_states_*.pkl")) or (path / "optimizer.bin").is_file()


# -- in ---------------------------------------------------------------------------------------------------------------------------


def read(path: Path, choices: Choices) -> Bundle:
    """Models, optimizers, schedulers, registered objects, the loss scale and the host's generators."""
    files = load_tree_files("torch")
    bundle = Bundle()
    randoms: dict[int, Path] = {}
    later: list[tuple[str, str, Path]] = []
    for file in sorted(path.iterdir()):
        found, random = _FILE.fullmatch(file.name), _RANDOM.fullmatch(file.name)
        if file.name in choices.skip or file.name == NAMES:
            continue
        if random:
            randoms[int(random[1])] = file
        elif file.name == "scaler.pt":
            scaler = files.read(file)
            bundle.shared["scaler"] = {"scale": scaler["scale"], "growth_tracker": scaler["_growth_tracker"]}
        elif found and found["end"] == _ENDS[found["kind"]]:
            later.append((found["kind"], found["index"] or "0", file))
        else:
            bundle.left_behind.append(file.name)
    for kind, index, file in sorted(later, key=lambda item: int(item[1])):
        if kind in ("model", "pytorch_model"):
            bundle.groups[_group("model", index)] = read_tensors(file) if kind == "model" else _model(files, file)
    names = {**_names_beside(path), **choices.parameter_names}
    for kind, index, file in sorted(later, key=lambda item: int(item[1])):
        if kind == "optimizer":
            _read_optimizer(bundle, _group(kind, index), files.read(file), file, names)
        elif kind == "scheduler":
            set_values(bundle, _group(kind, index), files.read(file))
        elif kind == "custom_checkpoint":
            set_values(bundle, f"custom_{index}", files.read(file))
    for process in range(len(randoms)):
        if process not in randoms:
            raise CheckpointError(f"{path} lacks random_states_{process}.pkl", "copy the folders of all hosts into one")
        _read_random(bundle, files.read(randoms[process]))
    if not models_of(bundle):
        raise CheckpointError(
            f"{path} holds no model.safetensors and no pytorch_model.bin",
            "FSDP's and DeepSpeed's folders inside it are checkpoints of their own: convert each pytorch_model_fsdp_0 by itself",
        )
    complete(bundle, "accelerate")
    return bundle


def _group(stem: str, index: str) -> str:
    return stem if int(index) == 0 else f"{stem}_{int(index)}"


def _model(files: TreeFiles, file: Path) -> Arrays:
    tree = files.read(file)
    if not isinstance(tree, dict) or not all(isinstance(value, StoredArray) for value in tree.values()):
        raise CheckpointError(f"{file} is no state_dict of tensors", "save the model's state_dict")
    return {str(name): value for name, value in tree.items()}


def _read_optimizer(bundle: Bundle, group: str, tree: Any, file: Path, given: dict[str, Sequence[str]]) -> None:
    if not isinstance(tree, dict) or set(tree) < {"state", "param_groups"}:
        raise CheckpointError(f"{file} is no state_dict of a torch optimizer", f"leave it out with --skip {file.name}")
    positions = [position for one in tree["param_groups"] for position in one["params"]]
    names = _names_of(group, tree["param_groups"], positions, given, file)
    by_position = dict(zip(positions, names, strict=True))
    shapes = {name: array.shape for model in models_of(bundle).values() for name, array in model.items()}
    arrays: Arrays = {}
    for at, slots in tree["state"].items():
        name = by_position[at]
        for slot, value in slots.items():
            if value is None:  # SGD without momentum keeps such an entry
                continue
            array = arrays[f"{name}.{slot}"] = slot_array(f"{file}: {slot} of {name}", value)
            wanted = shapes.get(name)
            if wanted is None:
                raise CheckpointError(
                    f"{file}: the model has no parameter {name!r}", "give the names that the model has"
                )
            if len(array.shape) == len(wanted) and array.shape != wanted:
                raise CheckpointError(
                    f"{file}: {slot} at position {at} has shape {array.shape}, and {name!r}, which is said to stand there, {wanted}",
                    "give the parameters in the order in which the optimizer was given them",
                )
    bundle.groups[group] = arrays
    set_param_groups(
        bundle, group, [{**one, "params": [by_position[at] for at in one["params"]]} for one in tree["param_groups"]]
    )


def _names_of(
    group: str, groups: Sequence[Any], positions: Sequence[int], given: dict[str, Sequence[str]], file: Path
) -> list[str]:
    names = [name for one in groups for name in one.get("param_names", ())]
    if group in given:
        names = list(given[group])
    if not names:
        raise CheckpointError(
            f"{file} numbers its parameters, and no file says which number is which",
            "write their names, in the order in which the optimizer was given them, with json.dump([name for name, _ in"
            " model.named_parameters()], file) and give the file as --parameter-names, or leave it out with --only model",
        )
    if len(names) != len(positions) or len(set(names)) != len(names):
        raise CheckpointError(
            f"{file} has {len(positions)} parameters, and {len(set(names))} different names are given for them",
            "name those that the optimizer updates, each once",
        )
    return names


def _names_beside(path: Path) -> dict[str, Sequence[str]]:
    file = path / NAMES
    if not file.is_file():
        return {}
    try:
        found = strict_json(file.read_bytes())
    except Malformed as error:
        raise CheckpointError(f"{file} is damaged: {error}", "give the names with --parameter-names") from error
    return {str(group): tuple(map(str, names)) for group, names in found.items()}


def _read_random(bundle: Bundle, tree: dict[str, Any]) -> None:
    state: dict[str, Any] = {}
    if "random_state" in tree:
        version, words, gauss = tree["random_state"]
        state["python"] = {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}
    if "numpy_random_seed" in tree:
        kind, key, position, has_gauss, gauss = tree["numpy_random_seed"]
        state["numpy"] = {
            "kind": kind,
            "key": key.read().astype("<u4").tobytes(),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": float(gauss),
        }
    if "torch_manual_seed" in tree:
        state["torch"] = tree["torch_manual_seed"].read().tobytes()
    known = {"step", "random_state", "numpy_random_seed", "torch_manual_seed"}
    for name in sorted(set(tree) - known):
        bundle.left_behind.append(f"{name} of process {len(bundle.own)}")
    bundle.own.append({"generators": state, "engine": {}})
    if tree.get("step"):
        bundle.shared["window"] = {
            "step": tree["step"], "sync_gradients": True, "num_steps": 1, "is_open": False
        }  # fmt: skip


# -- out --------------------------------------------------------------------------------------------------------------------------


def write(path: Path, bundle: Bundle) -> None:
    """What `load_state` of Accelerate reads. Loader positions, open gradients and the engine's generators have no place there."""
    files = load_tree_files("torch")
    models = models_of(bundle)
    if not models:
        raise CheckpointError("Accelerate's layout begins with a model, and none is there", "take the model too")
    path.mkdir()
    with Spool(path.parent) as spool:
        for index, arrays in enumerate(models.values()):
            write_tensors(path / f"model{_suffix(index)}.safetensors", arrays, spool)
        mapped = _Mapping(spool)
        names = {}
        for index, group in enumerate(numbered(bundle.groups, "optimizer")):
            tree, names[group] = _optimizer(bundle, group)
            files.write(path / f"optimizer{_suffix(index)}.bin", mapped(tree))
        values = bundle.shared.get("values", {})
        for index, group in enumerate(numbered(values, "scheduler")):
            files.write(path / f"scheduler{_suffix(index)}.bin", mapped(values_of(bundle, group)))
        for name in values:
            if name.startswith("custom_"):
                files.write(
                    path / f"custom_checkpoint_{name.removeprefix('custom_')}.pkl", mapped(values_of(bundle, name))
                )
    if bundle.shared.get("scaler"):
        files.write(path / "scaler.pt", _scaler(bundle.shared["scaler"]))
    for index, own in enumerate(bundle.own):
        files.write(path / f"random_states_{index}.pkl", _random(bundle, own))
    if any(names.values()):
        text = json.dumps({group: found for group, found in names.items() if found}, indent=1) + "\n"
        LocalFolder(path).write(NAMES, [memoryview(text.encode())])
    bundle.left_behind += _without_place(bundle)


class _Mapping:
    """Arrays of a tree behind the spool: torch.save takes all of a file at once."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def __call__(self, value: Any) -> Any:
        if isinstance(value, StoredArray):
            return StoredArray(value.dtype, value.shape, lambda: self._spool.keep(value.read()), value.kind)
        if type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        return type(value)(self(item) for item in value) if type(value) in (list, tuple) else value


def _suffix(index: int) -> str:
    return f"_{index}" if index else ""


def _optimizer(bundle: Bundle, group: str) -> tuple[dict[str, Any], list[str]]:
    groups = param_groups(bundle, group)
    if groups is None:
        raise CheckpointError(
            f"{group} was not saved by a torch optimizer with known parameters, and Accelerate's layout has place for no other",
            "take the model alone: --only model",
        )
    names = [name for one in groups for name in one["params"]]
    positions = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, array in bundle.groups[group].items():
        parameter, slot = trees.split_slot(name, bundle.parameters)
        if parameter is None or parameter not in positions:
            raise CheckpointError(
                f"{group}: {name!r} belongs to no parameter of the optimizer", "take the model alone: --only model"
            )
        state.setdefault(positions[parameter], {})[slot] = slot_value(slot, array)
    numbered_groups = [{**one, "params": [positions[name] for name in one["params"]]} for one in groups]
    return {"state": dict(sorted(state.items())), "param_groups": numbered_groups}, names


def _scaler(state: dict[str, Any]) -> dict[str, Any]:
    rule = LossScaling()
    return {
        "scale": state["scale"],
        "growth_factor": rule.growth_factor,
        "backoff_factor": rule.backoff_factor,
        "growth_interval": rule.growth_interval,
        "_growth_tracker": state["growth_tracker"],
    }


def _random(bundle: Bundle, own: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    generators = own.get("generators", {})
    tree: dict[str, Any] = {"step": bundle.shared.get("window", {}).get("step", 0)}
    if "python" in generators:
        python = generators["python"]
        words = struct.unpack(f"<{len(python['words']) // 4}I", python["words"])
        tree["random_state"] = (python["version"], words, python["gauss"])
    if "numpy" in generators:
        one = generators["numpy"]
        key = np.frombuffer(one["key"], "<u4").astype(np.uint32)
        stored = StoredArray("uint32", key.shape, lambda: key, "numpy")
        tree["numpy_random_seed"] = (one["kind"], stored, one["position"], one["has_gauss"], one["gauss"])
    if "torch" in generators:
        state = np.frombuffer(bytearray(generators["torch"]), np.uint8)
        tree["torch_manual_seed"] = StoredArray("uint8", state.shape, lambda: state)
    return tree


def _without_place(bundle: Bundle) -> list[str]:
    shared = bundle.shared
    reasons: list[tuple[str, Callable[[], object]]] = [
        ("positions of loaders", lambda: shared.get("loaders")),
        ("gradients of an open accumulation window", lambda: shared.get("window", {}).get("is_open")),
        ("generators of the devices", lambda: any(own.get("engine") for own in bundle.own)),
    ]
    return [name for name, is_there in reasons if is_there()]
