"""The configuration: precedence, sources, and mistakes shown all at once."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.config import Config
from polyaccel.config.resolve import resolve
from polyaccel.errors import ConfigError, PlanError, PolyaccelError
from polyaccel.mesh import MeshSpec


def test_arguments_beat_the_environment_and_the_environment_beats_defaults():
    environment = {"POLYACCEL_MIXED_PRECISION": "bf16", "POLYACCEL_GRADIENT_ACCUMULATION_STEPS": "4"}
    config = resolve({"gradient_accumulation_steps": 2}, environment)
    assert (config.mixed_precision, config.gradient_accumulation_steps, config.backend) == ("bf16", 2, "auto")
    assert config.sources == {
        "mixed_precision": "environment POLYACCEL_MIXED_PRECISION",
        "gradient_accumulation_steps": "argument gradient_accumulation_steps",
    }


def test_mesh_axes_come_from_the_environment_by_name():
    assert resolve({}, {"POLYACCEL_MESH__FSDP": "2", "POLYACCEL_MESH__DATA": "2"}).mesh == MeshSpec(data=2, fsdp=2)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("off", False), ("No", False)])
def test_switches_read_the_usual_words(text, value):
    assert resolve({}, {"POLYACCEL_SPLIT_BATCHES": text}).split_batches is value


def test_accelerates_variable_switches_debug_mode_on_and_our_own_counts_more():
    config = resolve({}, {"ACCELERATE_DEBUG_MODE": "1"})
    assert config.debug
    assert config.sources == {"debug": "environment ACCELERATE_DEBUG_MODE"}
    assert not resolve({}, {"POLYACCEL_DEBUG": "false", "ACCELERATE_DEBUG_MODE": "true"}).debug
    assert not resolve({}, {"ACCELERATE_DEBUG_MODE": ""}).debug
    with pytest.raises(ConfigError, match="environment ACCELERATE_DEBUG_MODE='maybe' is not true or false"):
        resolve({}, {"ACCELERATE_DEBUG_MODE": "maybe"})


def test_every_mistake_is_named_with_its_source_in_one_error():
    environment = {"POLYACCEL_MIXED_PRECISON": "bf16", "POLYACCEL_CPU": "perhaps", "POLYACCEL_MESH__TENSOR": "two"}
    with pytest.raises(ConfigError) as caught:
        resolve({"partitioning": "pmapp", "gradient_accumulation_steps": 0}, environment)
    text = str(caught.value)
    assert "5 mistakes" in text
    assert "did you mean 'POLYACCEL_MIXED_PRECISION'" in text
    assert "POLYACCEL_CPU='perhaps' is not true or false" in text
    assert "POLYACCEL_MESH__TENSOR='two'" in text
    assert "argument partitioning: partitioning='pmapp' is unknown: did you mean 'pmap'?" in text
    assert "gradient_accumulation_steps=0 must be at least 1" in text


def test_an_argument_that_contradicts_the_launcher_is_an_error():
    launched = {"POLYACCEL_LAUNCHED_BACKEND": "jax"}
    assert resolve({}, launched).backend == "jax"
    assert resolve({"backend": "jax"}, launched).backend == "jax"
    with pytest.raises(ConfigError, match="contradicts the launcher"):
        resolve({"backend": "torch"}, launched)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.text(max_size=12).map(lambda name: "POLYACCEL_" + name), st.text(max_size=8), max_size=4))
def test_no_environment_makes_it_crash(environment):
    with contextlib.suppress(PolyaccelError):  # refused with words is the other good answer
        assert isinstance(resolve({}, environment), Config)


def test_a_mesh_infers_one_axis_from_the_devices():
    assert MeshSpec.of({"fsdp": 2, "data": -1}).resolve(8).sizes == {
        "replica": 1, "data": 4, "fsdp": 2, "tensor": 1, "sequence": 1,
    }  # fmt: skip
    assert MeshSpec.of(None).resolve(4).num_data_shards == 4
    assert MeshSpec.of({"fsdp": -1}).resolve(4).fsdp == 4


def test_a_mesh_that_does_not_fit_names_both_numbers():
    with pytest.raises(PlanError, match=r"data=3 needs 3 devices, but this job has 4"):
        MeshSpec.of({"data": 3}).resolve(4)
    with pytest.raises(PlanError, match="4 is not a multiple of 3"):
        MeshSpec.of({"fsdp": 3, "data": -1}).resolve(4)


@pytest.mark.parametrize(
    "wrong", [{"date": 2}, {"data": 0}, {"data": -1, "fsdp": -1}, {"data": True}, "data=2", {"data": 1.5}]
)
def test_an_impossible_mesh_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"hint|mesh"):
        MeshSpec.of(wrong)
