"""mesh.sequence: sequences are cut, what follows them stays cut, and the training is that of one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import batches, loss_by_function, open_engine, train
from test_jax_tensor_axis import Gpt, next_token_loss, token_batches

from polyaccel.errors import PlanError, UnsupportedError
from polyaccel_jax.sequences import Sequences, labels_of_inputs
from polyaccel_jax.splits import Split

LENGTH = 64


def run(engine, num_steps=20):
    """Losses, and operations of the fused step on each device, as its compiler counts them."""
    model = engine.prepare_model(Gpt(nnx.Rngs(0), width=64, length=LENGTH))
    optimizer = engine.prepare_optimizer(optax.adamw(1e-3), model)
    compiled, flops, jitted = {}, [], engine.compiles.run

    def counted(function, *args):
        if len(args) < 4:
            return jitted(function, *args)
        if function not in compiled:
            compiled[function] = function.lower(*args).compile()  # used for the steps too: one compilation
            flops.append(compiled[function].cost_analysis()["flops"])
        return compiled[function](*args)

    engine.compiles.run = counted
    data = token_batches(num_steps, LENGTH)
    losses = train(engine, model, optimizer, data, loss_fn=next_token_loss, max_grad_norm=1.0)
    return np.array(losses), max(flops)


@functools.cache
def on_one_device():
    return run(open_engine(1))


@pytest.mark.parametrize("mesh", [{"data": 2, "sequence": 2}, {"tensor": 2, "sequence": 2}], ids=str)
def test_twenty_steps_of_a_gpt_are_those_of_one_device_and_each_device_does_its_part(mesh):
    expected, whole = on_one_device()
    losses, flops = run(open_engine(4, mesh=mesh, remat="none"))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)  # fp32 sums in another order
    assert flops == pytest.approx(whole / 4, rel=0.15)


def test_sequences_that_do_not_divide_are_refused_with_their_length_and_computed_whole_without_gradients():
    engine = open_engine(4, mesh={"sequence": 4})
    model = engine.prepare_model(Gpt(nnx.Rngs(0), length=18))
    engine.prepare_optimizer(optax.sgd(1e-3), model)
    (batch,) = token_batches(1, 18)
    with pytest.raises(PlanError, match=r"sequences of 18 cannot be cut over mesh\.sequence=4 in equal parts"):
        loss_by_function(engine, next_token_loss, model, batch)
    assert model(batch["x"]).shape == (8, 18, 64)


def test_a_step_without_sequences_is_refused():
    engine = open_engine(4, mesh={"sequence": 4})
    model = engine.prepare_model(nnx.Linear(1, 4, rngs=nnx.Rngs(0)))
    engine.prepare_optimizer(optax.sgd(1e-3), model)
    with pytest.raises(PlanError, match=r"mesh\.sequence=4 finds no sequences among the inputs, of shapes \(16,\)"):
        loss_by_function(
            engine, lambda model, x: model(x[:, None]).mean(), model, batches(1)[0]["y"].astype(np.float32)
        )


def test_whole_sequences_on_every_device_are_refused():
    with pytest.raises(UnsupportedError, match=r"mesh\.sequence=4 cuts sequences"):
        open_engine(4, mesh={"sequence": 4}, partitioning="pmap")


def test_the_length_is_that_of_the_first_integers():
    shapes, whole = [(8, 16, 32), (8, 4), (8, 4, 2), (8, 1, 4, 4), (4,)], [False, True, False, False, True]
    labels = labels_of_inputs(shapes, [0, 0, 0, 0, None], whole)
    assert labels == [
        ("batch", None, None),
        ("batch", "length"),
        ("batch", "length", None),
        ("batch", None, None, None),
        (None,),
    ]


def merged_layers(weights, x, targets):
    """What a captured torch program does: layers on (batch * length, features), heads, a loss over all rows."""
    up, down = weights
    batch, length, width = x.shape
    rows = jnp.tanh(x.reshape(-1, width) @ up + 1.0) @ down
    heads = rows.reshape(batch, length, 2, -1).transpose(0, 2, 1, 3)
    scores = jax.nn.softmax(heads @ heads.transpose(0, 1, 3, 2), axis=-1)
    rows = (scores @ heads).transpose(0, 2, 1, 3).reshape(-1, width)
    rows = jnp.concatenate([rows[:, :3], jnp.pad(rows, ((0, 0), (1, 0)))[:, 4:]], axis=1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(rows), targets.reshape(-1, 1), axis=1)
    return -jnp.where(jnp.argmax(rows, 1) >= 0, picked[:, 0], 0.0).mean() + jnp.cumsum(rows, axis=1).mean()


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain", "nested"])
def test_merged_batch_and_length_stay_two_dims_through_a_program_and_its_gradients(is_nested):
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=size).astype(np.float32) for size in ((6, 8), (8, 6)))
    x, targets = rng.normal(size=(2, 8, 6)).astype(np.float32), rng.integers(0, 6, (2, 8)).astype(np.int32)

    def layer(rows):
        return jnp.tanh(rows @ weights[0] @ weights[1])

    def loss(weights, x, targets):
        if is_nested:
            x, _ = jax.lax.scan(lambda x, _: (x + layer(x.reshape(-1, 6)).reshape(x.shape), None), x, None, length=2)
            x = jax.lax.fori_loop(0, targets[0, 0], lambda _, x: x + layer(x.reshape(-1, 6)).reshape(x.shape), x)
            x = jax.lax.cond(targets[0, 0] > 9, jnp.zeros_like, layer, x.reshape(-1, 6)).reshape(x.shape)
            return jax.checkpoint(merged_layers)(weights, x, targets)
        return merged_layers(weights, x, targets)

    both = jax.value_and_grad(loss)
    sequences = Sequences(open_engine(4, mesh={"data": 2, "sequence": 2}).mesh)
    labels = [(), (), ("batch", "length", None), ("batch", "length")]
    traced = jax.jit(functools.partial(sequences.run, both, labels))
    expected = jax.jit(both)(weights, x, targets)
    for got, wanted in zip(jax.tree.leaves(traced(weights, x, targets)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5, atol=1e-5)
    assert set(sequences.merges) <= {"scatter-add"}  # the gradient of take_along_axis


def test_a_dim_that_is_two_is_merged_where_an_operation_needs_it_as_one():
    sequences = Sequences(open_engine(4, mesh={"sequence": 4}).mesh)
    x = np.arange(32, dtype=np.float32).reshape(2, 8, 2)
    labels = [("batch", "length", None)]
    (got,) = (jax.jit(lambda x: sequences.run(lambda x: jnp.sort(-x.reshape(16, 2), axis=0), labels, x))(x),)
    np.testing.assert_array_equal(np.asarray(got), np.sort(-x.reshape(16, 2), axis=0))
    assert sequences.merges == {"sort": 1}
    one = Split(x, ("batch", "length", None), 0)
    assert (one.shape, one.own((1, 0)), one.merged().labels) == ((16, 2), (2, 0, 1), ("batch", None))
