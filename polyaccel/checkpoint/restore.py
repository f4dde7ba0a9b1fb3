"""Puts a checkpoint into a live run: everything is compared with what is there before anything is changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from polyaccel import generators
from polyaccel.checkpoint.array_values import array_names, put_arrays
from polyaccel.checkpoint.gradients import gradients_for, restore_weights
from polyaccel.checkpoint.read import Saved
from polyaccel.checkpoint.run import Part, Run, gradients_group, registered_group, values_group
from polyaccel.data import LoaderState
from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec

_SAME_SCRIPT = "prepare and register the same objects, in the same order, as the script that saved it"


def check(saved: Saved, run: Run, *, left_out: Collection[str] = ()) -> None:
    """Raises CheckpointError, naming what does not fit, unless `restore` can be done as a whole. Changes nothing."""
    shared = saved.shared
    _check_parts(saved, run, left_out)
    for part in (*run.models, *run.optimizers):
        if part.group not in left_out:
            run.engine.check_state(part.handle, _specs(saved, part.group))
    for part, sizes in zip(run.optimizers, shared["group_sizes"], strict=True):
        now = None if part.hyperparameters is None else part.group_sizes
        if sizes is not None and now != sizes:
            raise CheckpointError(
                f"{part.group} has parameter groups of {now} parameters, and was saved with groups of {sizes}",
                "build the optimizer with the parameter groups that it was saved with",
            )
    for part, state in _loaders(saved, run):
        part.handle.check_state(LoaderState(**state))
    for group, values in shared["values"].items():
        there = saved.arrays(group) if group in saved.groups else {}
        missing = [name for name in array_names(values) if name not in there]
        if missing:
            raise CheckpointError(f"{saved.path} lacks the array {missing[0]!r} of {group}", "load another checkpoint")
    _check_window(saved, run)


def restore(saved: Saved, run: Run, *, left_out: Collection[str] = ()) -> list[str]:
    """Make `run` what it was when it was saved; every process calls it, after `check`. Returns in words what starts anew."""
    engine, values = run.engine, saved.shared["values"]
    _restore_registered(saved, run)
    for part in (*run.models, *run.optimizers):
        if part.group not in left_out:
            engine.write_state(part.handle, saved.shards(part.group))
    for part in run.optimizers:
        _write_groups(part, _put(saved, values_group(part.group), values))
    for part in run.schedulers if saved.shared["schedulers"] is not None else ():
        part.public.load_state_dict(_put(saved, part.group, values))
    if saved.shared["scaler"] is not None:
        engine.write_scaler(saved.shared["scaler"])
    for part in run.models:
        group = gradients_group(part)
        engine.write_gradients(
            part.handle, gradients_for(saved, group, run.data_shard) if group in saved.groups else ()
        )
    window = saved.shared["window"]
    run.window.step, run.window.sync_gradients = window["step"], window["sync_gradients"]
    restore_weights(run, window["is_open"], window.get("weights"))
    for part, state in _loaders(saved, run):
        part.handle.load_state(LoaderState(**state))
    return [*_changes(saved, run), *_restore_random(saved, run)]


# -- what has to fit -------------------------------------------------------------------------------------------------------


def _check_parts(saved: Saved, run: Run, left_out: Collection[str]) -> None:
    shared = saved.shared
    try:
        pairs = [
            (role, shared[role], [part.kind for part in parts])
            for role, parts in (("models", run.models), ("optimizers", run.optimizers), ("schedulers", run.schedulers))
        ]
        pairs.append(("loaders", shared["loaders"], [part.kind for part in run.loaders]))
        pairs.append(("registered", shared["registered"], [type(value).__name__ for value in run.registered]))
    except KeyError as error:
        raise CheckpointError(
            f"{saved.path} was not written by save_state: it does not say its {error.args[0]}",
            "load weights alone with model.load_state_dict",
        ) from None
    for role, before, now in pairs:
        if before is None:
            continue  # another library has written it, and does not say
        if len(before) != len(now):
            raise CheckpointError(
                f"{saved.path} holds {len(before)} {_noun(role, len(before))}, and this script has {len(now)} {_noun(role, len(now))}",
                _SAME_SCRIPT,
            )
        if role in ("models", "loaders"):
            continue  # names and shapes of arrays decide, not the name of a class
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            if old is not None and old != new:
                raise CheckpointError(
                    f"{_noun(role, 1)} {index} was saved as a {old} and is a {new} here", _SAME_SCRIPT
                )
    for part in run.models:
        if part.group not in left_out and part.group not in saved.groups:
            raise CheckpointError(
                f"{saved.path} has no arrays of {part.group}: a save_state hook left them out",
                "register the load_state hook that loads this model itself",
            )


def _noun(role: str, count: int) -> str:
    if role == "registered":
        return "registered object" if count == 1 else "registered objects"
    return role.removesuffix("s") if count == 1 else role


def _check_window(saved: Saved, run: Run) -> None:
    window = saved.shared["window"]
    if not window["is_open"]:
        return
    if window["num_steps"] != run.window.num_steps:
        raise CheckpointError(
            f"{saved.path} was saved in the middle of an accumulation window of {window['num_steps']} micro batches, and"
            f" gradient_accumulation_steps is {run.window.num_steps}",
            f"continue with gradient_accumulation_steps={window['num_steps']}, or load a checkpoint saved after an update",
        )
    for part in run.models:
        group = gradients_group(part)
        if group not in saved.groups:
            raise CheckpointError(f"{saved.path} lacks the group {group!r}", "load another checkpoint")
        shapes = (
            {name: shape for name, (_, shape) in saved.arrays(part.group).items()} if part.group in saved.groups else {}
        )
        for name, (_, shape) in saved.arrays(group).items():
            if name in shapes and tuple(shape[1:]) != tuple(shapes[name]):
                raise CheckpointError(
                    f"{saved.path}: the gradient of {name!r} has shape {list(shape[1:])}, and the parameter {list(shapes[name])}",
                    "load another checkpoint",
                )


def _specs(saved: Saved, group: str) -> dict[str, ArraySpec]:
    if group not in saved.groups:  # an optimizer that never stepped
        return {}
    return {name: ArraySpec(tuple(shape), dtype) for name, (dtype, shape) in saved.arrays(group).items()}


def _loaders(saved: Saved, run: Run) -> Iterator[tuple[Part, Any]]:
    if saved.shared["loaders"] is not None:
        yield from zip(run.loaders, saved.shared["loaders"], strict=True)


# -- values ----------------------------------------------------------------------------------------------------------------


def _put(saved: Saved, group: str, values: Mapping[str, Any]) -> Any:
    arrays = {shard.name: shard for shard in saved.shards(group)} if group in saved.groups else {}
    return put_arrays(values[group], arrays)


def _write_groups(part: Part, groups: list[dict[str, Any]] | None) -> None:
    for live, given in zip(part.public.param_groups, groups or (), strict=True) if groups is not None else ():
        for key, value in given.items():
            held = live.get(key)
            if hasattr(held, "copy_") and hasattr(value, "dtype"):
                held.copy_(value)  # a learning rate that is a tensor: compiled code holds this one
            else:
                live[key] = value


def _restore_registered(saved: Saved, run: Run) -> None:
    """First of all, as user code may refuse: what it has taken by then is put back."""
    if saved.shared["registered"] is None:
        return
    states = [_put(saved, registered_group(i), saved.shared["values"]) for i in range(len(run.registered))]
    before = [value.state_dict() for value in run.registered]
    undo: list[Callable[[], Any]] = []
    try:
        for value, state, old in zip(run.registered, states, before, strict=True):
            undo.append(lambda value=value, old=old: value.load_state_dict(old))  # type: ignore[misc]
            value.load_state_dict(state)
    except BaseException:
        for step in undo:
            step()
        raise


# -- what cannot continue --------------------------------------------------------------------------------------------------


def _changes(saved: Saved, run: Run) -> Iterator[str]:
    for role, parts in (
        ("schedulers", run.schedulers),
        ("loaders", run.loaders),
        ("registered objects", run.registered),
    ):
        if parts and saved.shared[role.partition(" ")[0]] is None:
            yield f"{role} start anew: the checkpoint was converted, and holds nothing about them"
    scaler = run.engine.read_scaler()
    if scaler is not None and saved.shared["scaler"] is None:
        yield "the loss scale starts anew: there was none when the checkpoint was written"
    elif scaler is None and saved.shared["scaler"] is not None:
        yield "the loss scale of the checkpoint is not used: this run has none"


def _restore_random(saved: Saved, run: Run) -> list[str]:
    index = run.engine.topology.process_index
    owns = [saved.own(i) for i in range(saved.num_processes)]
    if "generators" not in owns[0]:
        return ["random numbers go on as they are here: the checkpoint was converted, and holds none"]
    fresh = zlib.crc32(f"{run.seed}/{saved.manifest.attempt}/{index}".encode())
    said = []
    mine = owns[min(index, len(owns) - 1)]
    if index >= len(owns) and any(own["generators"] != owns[0]["generators"] for own in owns):
        said.append(f"python's, numpy's and torch's random numbers start anew on process {index}, which was not there")
        generators.restart(fresh, frozenset(mine["generators"]))
    else:
        # Where all processes agreed, as after set_seed, an additional one agrees with them too.
        generators.write(mine["generators"])
    live = run.engine.read_random()
    if not live:
        return said
    if set(live) == set(mine["engine"]):
        run.engine.write_random(mine["engine"])
    else:
        said.append(
            f"random numbers on the devices (dropout) start anew: {_names(live)} cannot continue {_names(mine['engine'])}"
        )
        # One seed for all processes, as an engine that spans them takes one.
        run.engine.seed(zlib.crc32(f"{run.seed}/{saved.manifest.attempt}".encode()))
    return said


def _names(state: Mapping[str, Any]) -> str:
    return f"the generator of {' and '.join(sorted(state))}" if state else "that of the host"
