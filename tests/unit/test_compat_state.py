"""The state classes: what they say with, without and after an Accelerator."""

import copy
import gc
import pickle
from datetime import timedelta

import numpy as np
import pytest

from polyaccel import Accelerator, PartialState, jobs
from polyaccel.compat import state as states
from polyaccel.compat.state import AcceleratorState, GradientState, is_initialized
from polyaccel.distribution import distributed_type_of
from polyaccel.errors import ConfigError, NotStartedError, UnsupportedError
from polyaccel.logging import get_logger
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend, FakeModel
from polyaccel.topology import Topology
from polyaccel.utils import DistributedType

register_backend(FakeBackend())


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """Engines of other tests are not this one's."""
    monkeypatch.setattr(jobs, "_engines", [])
    monkeypatch.setattr(jobs, "_accelerators", [])
    monkeypatch.setattr(jobs, "_kept", None)
    monkeypatch.setattr(jobs, "_make", None)
    monkeypatch.setattr(states, "_gradients", None)
    monkeypatch.setenv("POLYACCEL_BACKEND", "fake")


def test_the_states_speak_of_the_accelerator_of_this_process():
    accelerator = Accelerator(gradient_accumulation_steps=4)
    state = AcceleratorState()
    assert (state.num_processes, state.process_index, state.local_process_index) == (1, 0, 0)
    assert state.is_main_process
    assert state.is_local_main_process
    assert state.is_last_process
    assert not state.use_distributed
    assert state.device == accelerator.device
    assert state.mixed_precision == "no"
    assert state.distributed_type is DistributedType.NO == "NO"
    assert GradientState().num_steps == 4
    assert "num_processes=1" in repr(state)


def test_partial_state_opens_a_job_for_a_script_without_an_accelerator():
    assert not is_initialized()
    state = PartialState()
    assert state.initialized
    assert state.num_processes == 1
    assert not is_initialized()  # it is no Accelerator of the script
    with pytest.raises(NotStartedError, match="AcceleratorState has no job"):
        AcceleratorState()
    get_logger("a_script").warning("a logger may be used now")


def test_before_the_first_accelerator_accelerator_state_raises_what_accelerate_raises():
    with pytest.raises(ValueError, match="has no job") as caught:
        AcceleratorState()
    assert "Accelerator()" in caught.value.hint


def test_a_state_made_before_the_accelerator_sees_it_too():
    state = PartialState()
    accelerator = Accelerator(mixed_precision="no")
    assert jobs.accelerator() is accelerator
    assert state.num_processes == accelerator.num_processes
    assert is_initialized()


def test_after_a_reset_attributes_are_gone_until_there_is_a_job_again():
    accelerator = Accelerator()
    state = PartialState()
    PartialState._reset_state()
    assert not state.initialized
    assert not hasattr(state, "device")
    with pytest.raises(AttributeError, match=r"`PartialState` object has no attribute `num_processes`.*_reset_state"):
        _ = state.num_processes
    with pytest.raises(AttributeError, match="'PartialState' object has no attribute 'anything'"):
        _ = state.anything
    with pytest.raises(NotStartedError):
        state.wait_for_everyone()
    assert PartialState._shared_state == {}
    assert "no job" in repr(state)
    assert accelerator.num_processes == 1  # the Accelerator itself goes on
    again = Accelerator()
    assert state.num_processes == again.num_processes
    assert PartialState._shared_state["num_processes"] == 1


def test_resetting_the_accelerator_state_alone_keeps_the_job():
    accelerator = Accelerator()
    AcceleratorState._reset_state()
    assert not is_initialized()
    assert PartialState().num_processes == 1
    with pytest.raises(AttributeError, match=r"`AcceleratorState` object has no attribute.*_reset_state"):
        _ = accelerator.num_processes
    with pytest.raises(AttributeError, match="`AcceleratorState` object has no attribute"):
        accelerator.prepare(FakeModel([[1.0]], [0.0]))
    assert accelerator.is_local_main_process  # PartialState's, which was not reset
    accelerator.end_training()
    state = accelerator.state
    with pytest.raises(AttributeError, match="`AcceleratorState` object has no attribute `num_processes`"):
        _ = state.num_processes
    again = Accelerator()
    assert state.num_processes == again.num_processes  # the newest one's, as AcceleratorState() says
    AcceleratorState._reset_state(True)
    assert jobs.accelerator() is None


def test_the_state_of_an_accelerator_is_its_own():
    first, second = Accelerator(gradient_accumulation_steps=4), Accelerator()
    assert first.state is first.state
    assert first.gradient_state.num_steps == 4  # a second one changes nothing
    first.state.note = "mine"
    assert not hasattr(second.state, "note")
    assert (first.state.num_devices, first.state.num_local_devices, first.state.device_kind) == (1, 1, "numpy")
    assert first.state.distributed_type is first.distributed_type is DistributedType.NO
    assert not first.state.debug
    first.state.destroy_process_group()
    first.state.destroy_process_group()
    with pytest.raises(UnsupportedError, match="destroy_process_group"):
        first.state.destroy_process_group(object())


def test_a_pickled_accelerator_is_the_one_of_this_process():
    accelerator = Accelerator()
    assert pickle.loads(pickle.dumps(accelerator)) is accelerator
    assert copy.deepcopy({"a": accelerator})["a"] is accelerator
    written = pickle.dumps(accelerator)
    del accelerator
    gc.collect()
    with pytest.raises(NotStartedError, match="was unpickled in a process"):
        pickle.loads(written)


def test_when_the_accelerator_is_gone_there_is_no_job():
    accelerator = Accelerator()
    state = PartialState()
    assert state.num_processes == 1
    del accelerator
    gc.collect()
    assert not state.initialized


def test_settings_that_contradict_the_accelerator_are_refused():
    accelerator = Accelerator(mixed_precision="no")
    assert AcceleratorState(mixed_precision="no", cpu=True).mixed_precision == accelerator.mixed_precision
    with pytest.raises(ConfigError, match="mixed_precision='bf16'"):
        AcceleratorState(mixed_precision="bf16")
    with pytest.raises(UnsupportedError, match="world_size"):
        PartialState(world_size=3)
    with pytest.raises(UnsupportedError, match="takes no plugin"):
        GradientState(object())


def test_what_a_state_that_opens_the_job_says_of_the_process_group_is_a_setting():
    PartialState(timeout=timedelta(minutes=3))
    assert jobs.accelerator().config.timeout_s == 180


def test_process_control_is_that_of_the_accelerator():
    state = PartialState()
    assert state.on_main_process(lambda: 1)() == 1
    assert state.on_local_main_process(lambda: 1)() == 1
    assert state.on_last_process(lambda: 1)() == 1
    assert state.on_process(process_index=1)(lambda: 1)() is None
    assert state.on_local_process(lambda: 1, local_process_index=0)() == 1
    with state.split_between_processes([1, 2]) as mine:
        assert mine == [1, 2]
    with state.main_process_first(), state.local_main_process_first():
        state.wait_for_everyone()


def test_printing_goes_through_the_job(capsys):
    PartialState().print("once per host")
    assert "once per host" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "kind", "num_processes", "mesh", "expected"),
    [
        ("torch", "cpu", 1, {}, "NO"),
        ("torch", "cuda", 1, {}, "NO"),
        ("torch", "cpu", 2, {}, "MULTI_CPU"),
        ("torch", "cuda", 2, {}, "MULTI_GPU"),
        ("torch", "npu", 2, {}, "MULTI_NPU"),
        ("torch", "cuda", 2, {"fsdp": 2}, "FSDP"),
        ("jax", "NVIDIA H100 80GB HBM3", 2, {}, "MULTI_GPU"),
        ("jax", "TPU v4", 1, {}, "XLA"),
        ("xla", "cpu", 1, {}, "XLA"),
    ],
)
def test_the_kind_of_job_has_accelerates_name(backend, kind, num_processes, mesh, expected):
    from types import SimpleNamespace

    from polyaccel.mesh import MeshSpec

    topology, plan = Topology(0, num_processes, 0, 1, num_processes, kind), SimpleNamespace(mesh=MeshSpec.of(mesh))
    assert distributed_type_of(backend, topology, plan) is DistributedType(expected)


def test_the_gradient_state_follows_the_loop():
    from polyaccel.testing.fake import FakeLoader

    accelerator = Accelerator(gradient_accumulation_steps=2)
    loader = accelerator.prepare(FakeLoader({"x": np.zeros((6, 1), np.float32)}, 2))
    state, seen = GradientState(), []
    assert not state.in_dataloader
    assert state.remainder == -1
    for _ in loader:
        with accelerator.accumulate():
            seen.append((state.sync_gradients, state.end_of_dataloader, state.active_dataloader is loader))
    assert seen == [(False, False, True), (True, False, True), (True, True, True)]
    state.sync_gradients = False
    assert not accelerator.sync_gradients
    state._set_sync_gradients(True)
    assert accelerator.sync_gradients
    assert state.sync_with_dataloader


def test_without_an_accelerator_every_batch_is_a_real_one_until_told_otherwise():
    state = GradientState()
    assert (state.num_steps, state.sync_gradients, state.initialized) == (1, True, True)
    state.sync_gradients = False
    assert not GradientState().sync_gradients
    GradientState._reset_state()
    assert GradientState().sync_gradients
