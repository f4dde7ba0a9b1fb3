"""mesh.fsdp: each device keeps its part of parameters, gradients and optimizer state, and the training is that of one device."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax_engines import Mlp, Noisy, batches, cross_entropy, loss_by_function, open_engine, train

from polyaccel_jax.dialect.creation import initial

MESHES = ({"fsdp": 4}, {"data": 2, "fsdp": 2})


def _on_device(arrays, index=0):
    return sum(array.addressable_shards[index].data.nbytes for array in arrays)


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_twenty_steps_are_those_of_one_device(mesh, partitioning):
    def losses(num_devices, **settings):
        engine = open_engine(num_devices, **settings)
        model = engine.prepare_model(Mlp(nnx.Rngs(0)))
        optimizer = engine.prepare_optimizer(optax.adamw(1e-2), model)
        return np.array(train(engine, model, optimizer, batches(20)))

    sharded = losses(4, mesh=mesh, partitioning=partitioning)
    np.testing.assert_allclose(sharded, losses(1), rtol=0, atol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_device_keeps_its_part_and_what_does_not_divide(mesh, partitioning):
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.inner = Mlp(rngs)
            self.odd = nnx.Param(jnp.zeros((3, 5)))

        def __call__(self, x):
            return self.inner(x) + self.odd[...].sum()

    engine = open_engine(4, mesh=mesh, partitioning=partitioning)
    model = engine.prepare_model(Odd(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adam(1e-2), model)
    held = model._polyaccel_model
    whole_odd, count = 3 * 5 * 4, 4

    def check():
        params = sum(leaf.nbytes for leaf in held.leaves)
        assert _on_device(held.leaves) == (params - whole_odd) // mesh["fsdp"] + whole_odd
        state = optimizer._polyaccel_optimizer.leaves
        assert _on_device(state) == 2 * _on_device(held.leaves) + count
        return params

    check()
    train(engine, model, optimizer, batches(3))
    params = check()
    loss_by_function(engine, cross_entropy, model, batches(1)[0], scale=0.5)
    assert _on_device(held.grads.values()) == (params - whole_odd) // mesh["fsdp"] + whole_odd
    engine.clip_grad_norm(model, 0.1, 2.0)
    optimizer.step()
    check()


def test_statistics_are_whole_on_every_device_and_random_numbers_still_differ():
    engine = open_engine(4, mesh={"fsdp": 4})
    model = engine.prepare_model(Noisy(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.sgd(1e-2), model)
    train(engine, model, optimizer, batches(2), max_grad_norm=1.0)
    held = model._polyaccel_model
    assert all(not leaf.is_fully_replicated for leaf in held.leaves)
    assert all(buffer.is_fully_replicated for buffer in held.buffer_arrays.values())


def test_a_state_of_parts_is_read_once_and_written_into_parts():
    one, four = open_engine(1), open_engine(4, mesh={"fsdp": 4})
    model = four.prepare_model(Mlp(nnx.Rngs(0)))
    optimizer = four.prepare_optimizer(optax.adam(1e-2), model)
    train(four, model, optimizer, batches(2))
    other = one.prepare_model(Mlp(nnx.Rngs(1)))
    one.write_state(other, four.read_state(model))
    again = four.prepare_model(Mlp(nnx.Rngs(2)))
    four.write_state(again, one.read_state(other))
    for a, b in zip(again._polyaccel_model.leaves, model._polyaccel_model.leaves, strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    fresh = four.prepare_optimizer(optax.adam(1e-2), again)
    four.write_state(fresh, four.read_state(optimizer))
    for a, b in zip(fresh._polyaccel_optimizer.leaves, optimizer._polyaccel_optimizer.leaves, strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_moving_average_lies_as_the_parameters_do():
    engine = open_engine(4, mesh={"fsdp": 4})
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    average = engine.parameter_average(model)
    average.update(0.5)
    average.write(average.read())
    assert [a.sharding for a in average._averages] == [leaf.sharding for leaf in model._polyaccel_model.leaves]


def test_parts_are_of_the_largest_dim_that_divides():
    mesh = open_engine(4, mesh={"fsdp": 4}).mesh
    assert mesh.kept_axis((8, 12)) == 1
    assert mesh.kept_axis((8, 13)) == 0
    assert mesh.kept_axis((8, 8)) == 0
    assert mesh.kept_axis((3, 5)) is None
    assert mesh.kept_axis(()) is None
    assert mesh.kept_axis((0, 4)) == 1
    keys = jax.random.split(jax.random.key(0), 4)
    assert mesh.kept(keys).is_fully_replicated


class Wide(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 4096, rngs=rngs)
        self.norm = nnx.BatchNorm(4096, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4096, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.norm(self.first(x))))


class WideLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.BatchNorm(use_running_average=False)(linen.Dense(4096)(x)))


def _linen():
    module = WideLinen()
    return module.bind(module.init(jax.random.key(0), jnp.ones((1, 8))))


@pytest.mark.parametrize("make", [lambda: Wide(nnx.Rngs(0)), _linen], ids=["nnx", "linen"])
def test_parameters_are_computed_in_their_parts_and_never_whole(make):
    engine = open_engine(4, mesh={"fsdp": 4})
    model = engine.create_model(make)
    whole, made = make(), model
    if isinstance(model, nnx.Module):
        params, expected = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (made, whole))
    else:
        params, expected = (jax.tree.leaves(m.variables["params"]) for m in (made, whole))
    assert [leaf.sharding for leaf in params] == [engine.mesh.kept(leaf) for leaf in params]
    for a, b in zip(params, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-6)  # compiled in one piece
    needs = initial(make, engine.mesh).lower().compile().memory_analysis()
    total = sum(leaf.nbytes for leaf in expected)
    row = 4096 * 4  # statistics are whole, and a linen module computes its example
    assert needs.output_size_in_bytes <= total // 4 + 2 * row + 1024
    assert needs.temp_size_in_bytes <= total // 2 + 2 * row
    prepared = engine.prepare_model(model)
    optimizer = engine.prepare_optimizer(optax.sgd(1e-2), prepared)
    losses = train(engine, prepared, optimizer, batches(2))
    assert np.isfinite(losses).all()
    assert _on_device(prepared._polyaccel_model.leaves) == total // 4


def test_a_module_that_was_made_in_parts_has_no_second_copy_beside_the_model():
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    engine = open_engine(4, mesh={"fsdp": 4})
    model = engine.prepare_model(engine.create_model(lambda: Wide(nnx.Rngs(0))))
    gc.collect()
    total = sum(leaf.nbytes for leaf in model._polyaccel_model.leaves)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1.5 * total
    optimizer = engine.prepare_optimizer(optax.sgd(1e-2), model)
    model.eval()
    model.train()
    train(engine, model, optimizer, batches(1))
    expected = np.asarray(model._polyaccel_model.params["second.bias"])
    np.testing.assert_array_equal(np.asarray(model.second.bias[...]), expected)  # user code looks: current values
    model.second.bias[...] = jnp.ones(4)
    model(jnp.ones((4, 8)))  # takes over what was written
    np.testing.assert_array_equal(np.asarray(model._polyaccel_model.params["second.bias"]), 1)


def test_what_is_no_flax_module_is_returned_as_it_was_made():
    engine = open_engine(4, mesh={"fsdp": 4})
    made = []
    assert engine.create_model(lambda: made.append({"a": 1}) or made[-1]) is made[0]
