"""Topology names, chips, and what a report makes of a compiler's numbers."""

from __future__ import annotations

import json

import pytest

from polyaccel.errors import ConfigError
from polyaccel.planned.chips import CHIPS
from polyaccel.planned.report import (
    Collective,
    ProgramPlan,
    StepPlan,
    as_json,
    estimate,
    fits,
    merged,
    step_plan_of,
)
from polyaccel.planned.topologies import topology_named, with_devices

GIB = 1024**3
V5E = CHIPS["v5e"]


def program(**changes):
    values = {
        "name": "train_step",
        "argument_bytes": 4 * GIB,
        "output_bytes": 0,
        "temporary_bytes": 2 * GIB,
        "code_bytes": 0,
        "resident_bytes": 0,
        "flops": 197e12,
        "accessed_bytes": 81.9e9,
        "matrix_flops": 98.5e12,
        "compiler_s": None,
        "compile_s": 1.0,
    }
    return ProgramPlan(**{**values, **changes})


def step(*programs, **changes):
    values = {
        "topology": "v5e:4x4",
        "num_devices": 16,
        "mesh": {"data": 1, "fsdp": 16},
        "num_parameters": 10,
        "parameter_bytes": 40,
        "buffer_bytes": 0,
        "optimizer_bytes": 80,
        "programs": programs or (program(),),
    }
    return StepPlan(**{**values, **changes})


def test_a_topology_is_a_chip_and_a_grid():
    topology = topology_named("v5e:4x4")
    assert (topology.platform, topology.num_devices, topology.chip) == ("tpu", 16, V5E)
    assert topology_named("v5p:4x4x8").num_devices == 128
    assert topology_named("cpu:8").num_devices == 8
    assert topology_named("cpu:8").chip is None


@pytest.mark.parametrize(
    ("text", "wraps"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),  # less than a cube of 4x4x4
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v5e:2x4", (False, False)),
        ("cpu:16", (False,)),
    ],
)
def test_a_slice_is_a_torus_where_its_chips_are_wired_as_one(text, wraps):
    assert topology_named(text).wraps == wraps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5f:4x4", "did you mean"),
        ("v5e", "v5e:4x4"),
        ("v5e:4x4x4", "grids of 2"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v5e:0x4", "sizes"),
    ],
)
def test_a_topology_that_is_none_is_refused_with_one_that_is(text, words):
    with pytest.raises(ConfigError, match=words):
        topology_named(text)


def test_a_slice_grows_in_powers_of_two():
    grown = [with_devices(topology_named("v5e:2x2"), num).text for num in (1, 8, 16, 256)]
    assert grown == ["v5e:1x1", "v5e:2x4", "v5e:4x4", "v5e:16x16"]
    assert with_devices(topology_named("v5p:2x2x1"), 128).text == "v5p:4x4x8"
    with pytest.raises(ConfigError, match="powers of two"):
        with_devices(topology_named("v5e:2x2"), 12)


def test_every_chip_names_its_source():
    assert all(chip.source.startswith("https://") and chip.hbm_bytes > 2**33 for chip in CHIPS.values())


def test_the_peak_is_that_of_the_largest_program():
    plan = step(program(), program(name="update", temporary_bytes=0, resident_bytes=GIB))
    assert plan.peak_bytes == 6 * GIB
    assert fits(plan, V5E) is True
    assert fits(plan, None) is None
    assert fits(step(program(temporary_bytes=13 * GIB)), V5E) is False


def test_a_step_that_the_compiler_refused_fits_nowhere():
    plan = step(refusal="exceeds available HBM")
    assert plan.peak_bytes is None
    assert fits(plan, V5E) is False
    assert estimate(plan, V5E) is None


def test_without_the_compilers_word_a_roofline_bounds_the_time():
    found = estimate(step(), V5E)
    assert found.source == "roofline"
    assert found.seconds == pytest.approx(1.0)  # operations at the peak; memory would take 0.1 s
    assert found.mfu == pytest.approx(0.5)
    assert found.bounds["memory"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("said", "source"), [(2.0, "compiler"), (-3.0, "roofline"), (0.01, "roofline"), (float("inf"), "roofline")]
)
def test_an_impossible_time_of_the_compiler_is_not_shown(said, source):
    assert estimate(step(program(compiler_s=said)), V5E).source == source


def test_exchanges_of_a_kind_are_added_up():
    one = Collective("all-gather", 4, 2, 100, 75)
    assert merged([one, one, Collective("all-reduce", 4, 1, 400, 600)]) == (
        Collective("all-reduce", 4, 1, 400, 600),
        Collective("all-gather", 4, 4, 200, 150),
    )


def test_a_report_survives_json():
    plan = step(program(collectives=(Collective("all-gather", 4, 2, 100, 75),)), remarks=("one",))
    tree = json.loads(json.dumps(as_json(plan, V5E)))
    assert step_plan_of(tree) == plan
    assert tree["fits"] is True
    assert tree["chip"]["name"] == "v5e"
