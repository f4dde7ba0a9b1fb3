"""Profiles on jax: what settings of Accelerate's meaning record, and what a bar is told of devices."""

import gzip
import json

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polyaccel import Accelerator
from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError
from polyaccel.looking.meter import settle


def squared(model, x):
    return (model(x) ** 2).mean()


def prepared(loss_fn=squared):
    accelerator = Accelerator(backend="jax", cpu=True)
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))
    return accelerator, accelerator.train_step(loss_fn, model, optimizer)


def events(profile):
    (file,) = [file for file in profile.files if file.name == "perfetto_trace.json.gz"]
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def test_stacks_and_memory_are_recorded_when_asked_for(tmp_path):
    accelerator, step = prepared()
    with_all = ProfileKwargs(with_stack=True, profile_memory=True, output_trace_dir=tmp_path / "a")
    with accelerator.profile(with_all) as profile:
        step(np.ones((8, 8), np.float32))
    assert "PjitFunction(step)" in profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=500)
    assert gzip.decompress(next(file for file in profile.files if file.name == "memory.prof").read_bytes())
    assert any("test_jax_profile" in str(event) for event in events(profile)), "the function that called"
    assert "PjitFunction(step)" in {event.get("name") for event in events(profile)}
    with accelerator.profile(ProfileKwargs(output_trace_dir=tmp_path / "b")) as profile:
        step(np.ones((8, 8), np.float32))
    assert not any("test_jax_profile" in str(event) for event in events(profile))


def test_two_traces_within_a_second_do_not_share_a_folder(tmp_path):
    accelerator, step = prepared()
    option = {"active": 1, "repeat": 2}
    with accelerator.profile(ProfileKwargs(schedule_option=option, output_trace_dir=tmp_path)) as profile:
        for _ in range(3):
            step(np.ones((8, 8), np.float32))
            profile.step()
    traces = [file for file in profile.files if file.name == "perfetto_trace.json.gz"]
    assert len({file.relative_to(tmp_path).parts[0] for file in traces}) == 2


def test_an_activity_that_is_not_here_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="'tpu'"):
        prepared()[0].profile(ProfileKwargs(activities=["tpu"]))


def test_a_fence_is_passed_when_the_last_step_is_done():
    def slow(model, x):
        loss = squared(model, x)
        return loss + 0 * jax.lax.fori_loop(0, 100, lambda _, a: jnp.tanh(a @ a), jnp.full((300, 300), loss))[0, 0]

    accelerator, step = prepared(slow)
    engine = accelerator._engine
    assert engine.fence() is None, "nothing was started"
    batch = np.ones((8, 8), np.float32)
    step(batch)
    loss = step(batch)
    fence = engine.fence()
    assert not loss.is_ready()
    fence()
    assert loss.is_ready()
    assert engine.fence() is None


def test_the_bar_of_a_flax_loop_tells_operations_of_every_device(capsys):
    accelerator, step = prepared()
    assert accelerator.num_data_shards == len(jax.devices()) == 4
    done = accelerator._engine.count_flops()
    loader = accelerator.prepare_data_loader([np.ones((8, 8), np.float32)] * 8)
    for batch in accelerator.progress(loader, description="flax"):
        step(batch)
    settle(5.0)
    # Forward and the gradient of the weights, the input needs none: two steps of eight rows on each of four devices.
    assert done() == 2 * (2 * 2 * 32 * 8 * 8)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "FLOP/s" in line
    assert "samples/s" in line
