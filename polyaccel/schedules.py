"""How far one optimizer update moves a learning-rate schedule: the setting `scheduler_unit`, and the line that says what is in force."""

from __future__ import annotations

import logging

from polyaccel.config import Config
from polyaccel.plan import Plan
from polyaccel.topology import Topology

_log = logging.getLogger("polyaccel.schedules")


def steps_per_update(config: Config, plan: Plan, topology: Topology, *, is_first: bool) -> int:
    """The steps of a scheduler per update: with `scheduler_unit="step"` one; with "sample" one per data shard, since an update consumes
    that many of the loader's batches (Accelerate's rule), or as many as `micro_batches_per_update` says, and one with split_batches, whose
    batches are global.

    Where the two differ, the main process logs once, at the first scheduler (`is_first`), which one is in force: a warning where nobody
    chose it.
    """
    counts_samples = config.scheduler_unit == "sample" and not plan.split_batches
    # The number of data shards may change when a job is resumed; a setting that says what an update consumes in all does not.
    whole = config.micro_batches_per_update or plan.num_data_shards
    steps = whole if counts_samples else 1
    differs = whole > 1 and not plan.split_batches and config.step_scheduler_with_optimizer
    if differs and is_first and topology.is_main_process:
        was_chosen = "scheduler_unit" in config.sources
        other = (
            '"step": one per update'
            if counts_samples
            else '"sample": one per data shard and update, as Accelerate does'
        )
        _log.log(
            logging.INFO if was_chosen else logging.WARNING,
            "schedulers take %d step%s per optimizer update on %d data shards (scheduler_unit=%r%s; the other choice is %s)",
            steps,
            "s" if steps > 1 else "",
            plan.num_data_shards,
            config.scheduler_unit,
            "" if was_chosen else ", the default, as Accelerate does",
            other,
        )
    return steps
