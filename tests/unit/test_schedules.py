"""How far an update moves a schedule, and that the job says which rule is in force where the rules differ."""

import logging
from types import SimpleNamespace

import pytest

from polyaccel.config import Config
from polyaccel.schedules import steps_per_update
from polyaccel.topology import Topology


def steps(num_shards, *, process=0, is_first=True, **settings):
    config = Config(sources=dict.fromkeys(settings, "argument"), **settings)
    topology = Topology(process, num_shards, process, 1, num_shards, "cpu")
    plan = SimpleNamespace(num_data_shards=num_shards, split_batches=config.split_batches)
    return steps_per_update(config, plan, topology, is_first=is_first)


def test_a_schedule_of_samples_moves_with_every_data_shard_as_in_accelerate():
    assert steps(1) == 1
    assert steps(4) == 4
    assert steps(4, split_batches=True) == 1  # an update consumes one of the loader's batches


def test_a_schedule_of_steps_moves_with_updates():
    assert steps(4, scheduler_unit="step") == 1
    assert steps(4, scheduler_unit="step", split_batches=True) == 1


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "polyaccel.schedules")
    return lambda: caplog.records


def test_the_default_is_said_with_a_warning_where_nobody_chose_it(lines):
    steps(4)
    (line,) = lines()
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        "schedulers take 4 steps per optimizer update on 4 data shards (scheduler_unit='sample', the default, as Accelerate does;"
        ' the other choice is "step": one per update)'
    )


def test_a_choice_is_said_without_one(lines):
    steps(2, scheduler_unit="step")
    (line,) = lines()
    assert line.levelno == logging.INFO
    assert line.getMessage().startswith("schedulers take 1 step per optimizer update on 2 data shards")


def test_it_is_said_once_by_the_main_process_and_only_where_it_matters(lines):
    steps(2, process=1)
    steps(2, is_first=False)
    steps(1)
    steps(2, split_batches=True)
    steps(2, step_scheduler_with_optimizer=False)
    assert not lines()
