"""What `collect` wrote, read without the run: parameter groups, schedulers, generators. And the same for what others have written.

Where a foreign checkpoint does not say something, the entry is None: `restore` then leaves that part of the run as it is and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, models_of, numbered, position
from polyaccel.checkpoint.run import values_group
from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredArray

_MARK, _KIND = "$array", "kind"  # as `array_values` writes them
# How torch executes an update; no part of a checkpoint of ours, and expected in every parameter group by torch's own loaders.
EXECUTION: dict[str, Any] = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


def is_optimizer(group: str) -> bool:
    """Whether a group holds an optimizer's state."""
    return position(group, "optimizer") is not None


def parameters_of(bundle: Bundle) -> frozenset[str]:
    """Every name that an optimizer's arrays may begin with: those of the models, and with `model_<i>.` in front."""
    found: set[str] = set()
    models = models_of(bundle).values()
    for arrays in models:
        found.update(arrays)
        found.update(f"model_{index}.{name}" for index in range(len(models)) for name in arrays)
    for names in bundle.shared.get("parameter_names") or ():
        found.update(names or ())
    return frozenset(found)


# -- values with arrays inside ----------------------------------------------------------------------------------------------------


def put_stored(value: Any, arrays: Mapping[str, StoredArray]) -> Any:
    """The value with its arrays, which are not read."""
    if type(value) is dict:
        if set(value) == {_MARK, _KIND}:
            return replace(arrays[value[_MARK]], kind=value[_KIND])
        return {key: put_stored(item, arrays) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(put_stored(item, arrays) for item in value)
    return value


def take_stored(value: Any, where: str, into: Arrays) -> Any:
    """The value as `put_stored` takes it; its arrays go to `into`."""
    if isinstance(value, StoredArray):
        into[where] = value
        return {_MARK: where, _KIND: value.kind}
    inside = f"{where}." if where else ""
    if type(value) is dict:
        return {key: take_stored(item, f"{inside}{key}", into) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(take_stored(item, f"{inside}{index}", into) for index, item in enumerate(value))
    return value


def values_of(bundle: Bundle, group: str) -> Any:
    """The plain values of a part with its arrays, None where there are none."""
    value = bundle.shared.get("values", {}).get(group)
    return None if value is None else put_stored(value, bundle.groups.get(group, {}))


def set_values(bundle: Bundle, group: str, value: Any) -> None:
    """What `values_of` gives back."""
    arrays: Arrays = {}
    bundle.shared.setdefault("values", {})[group] = take_stored(value, "", arrays)
    if arrays:
        bundle.groups[group] = arrays


# -- optimizers -------------------------------------------------------------------------------------------------------------------


def param_groups(bundle: Bundle, group: str) -> list[dict[str, Any]] | None:
    """The parameter groups of an optimizer with the names of their `params`; None where it has no groups, or they are not known."""
    index = position(group, "optimizer") or 0
    values = values_of(bundle, values_group(group))
    names = bundle.shared.get("parameter_names") or []
    if values is None or index >= len(names) or names[index] is None:
        return None
    rest = iter(names[index])
    sizes = bundle.shared["group_sizes"][index]
    return [{**given, "params": list(islice(rest, size))} for given, size in zip(values, sizes, strict=True)]


def set_param_groups(bundle: Bundle, group: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """What `param_groups` gives back, without the flags of execution."""
    index = position(group, "optimizer") or 0
    plain = [
        {key: value for key, value in one.items() if key not in (*EXECUTION, "params", "param_names")} for one in groups
    ]
    set_values(bundle, values_group(group), plain)
    for key, value in (
        ("parameter_names", [name for one in groups for name in one["params"]]),
        ("group_sizes", [len(one["params"]) for one in groups]),
    ):
        entries = bundle.shared.setdefault(key, [])
        entries.extend([None] * (index + 1 - len(entries)))
        entries[index] = value


def slot_value(slot: str, array: StoredArray) -> Any:
    """A slot as torch's optimizers keep it: what was a Python number is one again (see `dialect.states`)."""
    if not array.shape and (array.dtype == "int64" or (array.dtype == "float64" and slot != "step")):
        return array.read().item()
    return array


def slot_array(name: str, value: Any) -> StoredArray:
    """A slot of torch's as an array: Python numbers become int64 or float64. Raises CheckpointError for anything else."""
    if isinstance(value, StoredArray):
        return value
    if type(value) not in (int, float):
        raise CheckpointError(
            f"{name} is a {type(value).__name__}, and only arrays and numbers can be an optimizer's state",
            "leave the optimizer out with --only",
        )
    import numpy as np

    array = np.asarray(value, np.int64 if type(value) is int else np.float64)
    return StoredArray(array.dtype.name, (), lambda: array)


# -- what a foreign checkpoint does not say -----------------------------------------------------------------------------------------


def complete(bundle: Bundle, origin: str) -> None:
    """Add what `restore` asks for, None for what the source did not say."""
    shared = bundle.shared
    optimizers = numbered(bundle.groups, "optimizer")
    values = shared.setdefault("values", {})
    for group in optimizers:
        values.setdefault(values_group(group), None)
    num_optimizers = len(optimizers)
    for key in ("parameter_names", "group_sizes"):
        entries = shared.setdefault(key, [])
        entries.extend([None] * (num_optimizers - len(entries)))
    schedulers = numbered(values, "scheduler")
    registered = [name for name in values if name.startswith("custom_")]
    shared.setdefault("backend", origin)
    shared.setdefault("iteration", 0)
    shared.setdefault("models", [None] * len(models_of(bundle)))
    shared.setdefault("optimizers", [None] * num_optimizers)
    shared.setdefault("schedulers", [None] * len(schedulers) if schedulers else None)
    shared.setdefault("registered", [None] * len(registered) if registered else None)
    shared.setdefault("loaders", None)
    shared.setdefault("window", {"step": 0, "sync_gradients": True, "num_steps": 1, "is_open": False})
    shared.setdefault("scaler", None)
