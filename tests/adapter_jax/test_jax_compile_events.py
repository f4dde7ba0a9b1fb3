"""A flax script: every compiled program is listed with its cause, and ragged batches make one program per bucket."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from polyaccel import Accelerator
from polyaccel.data import Bucketing, masked_mean


def scores_loss(model, batch, power=2):
    scores = model(batch["x"][..., None])[..., 0]  # (batch, time)
    return masked_mean(jnp.abs(scores) ** power, batch["mask"])


def prepared():
    import optax

    accelerator = Accelerator(backend="jax", cpu=True, compilation_cache="off")
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    return accelerator, *accelerator.prepare(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))


def ragged(count):
    lengths = np.random.default_rng(0).integers(1, 9, count)
    return [{"x": np.ones(length, np.float32)} for length in lengths]


def test_a_flax_step_compiles_one_program_per_bucket_and_says_why():
    accelerator, model, optimizer = prepared()
    step = accelerator.train_step(scores_loss, model, optimizer)
    for batch in Bucketing([4, 8], batch_size=4).batches(ragged(22), 4):
        step(batch)
    events = [event for event in accelerator.compile_events if event.program == "train_step of scores_loss"]
    assert len(events) == 2
    assert events[0].cause == "first call"
    assert "batch['x'] changed from float32[4, 8] to float32[4, 4]" in events[1].cause
    assert "batch['mask'] changed from bool[4, 8] to bool[4, 4]" in events[1].cause


def test_a_static_argument_and_a_mode_of_a_flax_model_are_causes():
    accelerator, model, _ = prepared()
    batch = {"x": np.ones((4, 3), np.float32), "mask": np.ones((4, 3), bool)}

    def loss_fn(model, batch, name):
        return scores_loss(model, batch, 2 if name == "square" else 1)

    accelerator.backward(loss_fn, model, batch, "square")
    accelerator.backward(loss_fn, model, batch, "abs")
    causes = [event.cause for event in accelerator.compile_events if "loss_fn" in event.program]
    assert causes[0] == "first call"
    assert "name changed from 'square' to 'abs'" in causes[1]
    assert "batch" not in causes[1]
