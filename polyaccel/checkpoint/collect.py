"""Reads everything that a run remembers into one process's share of a checkpoint: memory of its own, so that training can go on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from polyaccel import generators
from polyaccel.checkpoint.array_values import take_arrays
from polyaccel.checkpoint.contents import Contents
from polyaccel.checkpoint.gradients import window_weights
from polyaccel.checkpoint.run import Run, gradients_group, registered_group, values_group
from polyaccel.protocols import Shard


def collect(run: Run, *, iteration: int, left_out: Collection[str] = ()) -> Contents:
    """Everything that `run` remembers; models whose groups are in `left_out` are somebody else's to save.

    Every process must call it. Nothing is changed. Raises CheckpointError for state that is neither an array nor a plain value.
    """
    engine = run.engine
    # Engines start their copies to the host when they are asked; so all of them are on the way before the first is waited for.
    reads = [(part.group, engine.read_state(part.handle)) for part in run.models if part.group not in left_out]
    reads += [(part.group, engine.read_state(part.handle)) for part in run.optimizers]
    if run.is_in_window:
        reads += [(gradients_group(part), engine.read_gradients(part.handle)) for part in run.models]
    contents = Contents({group: list(shards) for group, shards in reads}, _shared(run, iteration))
    is_main = engine.topology.is_main_process
    for group, values in _values(run).items():
        arrays: list[Shard] = []
        taken = take_arrays(values, "", arrays)
        if arrays and is_main:
            contents.groups[group] = arrays
        contents.shared["values"][group] = taken
    contents.own = {"generators": generators.read(), "engine": engine.read_random()}
    return contents


def _shared(run: Run, iteration: int) -> dict[str, Any]:
    window = run.window
    return {
        "backend": run.backend,
        "iteration": iteration,
        "models": [part.kind for part in run.models],
        "optimizers": [part.kind for part in run.optimizers],
        "schedulers": [part.kind for part in run.schedulers],
        "registered": [type(value).__name__ for value in run.registered],
        "loaders": [asdict(part.handle.state) for part in run.loaders],
        "parameter_names": [run.engine.parameter_names(part.handle) for part in run.optimizers],
        "group_sizes": [None if part.hyperparameters is None else part.group_sizes for part in run.optimizers],
        "window": {
            "step": window.step,
            "sync_gradients": window.sync_gradients,
            "num_steps": window.num_steps,
            "is_open": run.is_in_window,
            "weights": window_weights(run),
        },
        "scaler": run.engine.read_scaler(),
        "values": {},
    }


def _values(run: Run) -> dict[str, Any]:
    """Plain values of the parts by the group that arrays inside them go to."""
    found: dict[str, Any] = {values_group(part.group): part.hyperparameters for part in run.optimizers}
    found |= {part.group: part.public.state_dict() for part in run.schedulers}
    found |= {registered_group(index): value.state_dict() for index, value in enumerate(run.registered)}
    return found
