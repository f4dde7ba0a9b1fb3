"""`remat` for flax modules: the same training to the last bit of its state, and less kept between forward and backward."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax_engines import batches, cross_entropy, loss_by_function, open_engine

from polyaccel.protocols import StepSpec
from polyaccel_jax.dialect.recomputed_blocks import policy_of, recomputed_nnx

WIDTH, NUM_BLOCKS = 8, 3


class Block(nnx.Module):
    """Running statistics and random numbers: what may not happen twice."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 32, rngs=rngs), nnx.Linear(32, WIDTH, rngs=rngs)

    def __call__(self, x, *, scale=1.0, is_tanh=True):
        y = self.up(self.dropout(self.norm(x)))
        return x + scale * self.down(jnp.tanh(y) if is_tanh else y)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(NUM_BLOCKS)])
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x, is_tanh=True)
        return self.head(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        y = linen.BatchNorm(use_running_average=not train)(x)
        y = linen.Dropout(0.5, deterministic=not train)(y)
        return x + linen.Dense(WIDTH)(jnp.tanh(linen.Dense(32)(y)))


class LinenStack(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        for _ in range(NUM_BLOCKS):
            x = LinenBlock()(x, train)
        return linen.Dense(4)(x)


def make(kind):
    if kind == "nnx":
        return Stack(nnx.Rngs(0))
    module = LinenStack()
    return module.bind(module.init(jax.random.key(0), jnp.zeros((2, WIDTH)), train=False))


def trained(kind, remat, **settings):
    """Losses, everything that the model holds, and the text of the compiled step."""
    engine = open_engine(settings.pop("num_devices", 1), remat=remat, **settings)
    model = engine.prepare_model(make(kind))
    optimizer = engine.prepare_optimizer(optax.adamw(1e-2), model)
    step = engine.train_step(StepSpec(cross_entropy, model, model, optimizer))
    programs, run = [], engine.compiles.run

    def compiled(function, *args):
        programs.append(function.lower(*args).as_text())
        engine.compiles.run = run
        return run(function, *args)

    engine.compiles.run = compiled
    losses = [float(step(batch)) for batch in batches(4)]
    handle = model._polyaccel_model
    values = {
        name: np.array(value) for name, value in {**handle.params, **handle.buffer_arrays}.items() if "key" not in name
    }
    return losses, values, programs[0]


REPLICAS = {"num_devices": 2, "mixed_precision": "bf16", "partitioning": "pmap"}


@pytest.mark.parametrize(
    ("kind", "remat", "how"), [("nnx", "full", {}), ("linen", "full", {}), ("nnx", "dots", REPLICAS)]
)
def test_training_with_statistics_and_dropout_is_the_same(kind, remat, how):
    losses, values, text = trained(kind, "none", **how)
    again, values_again, text_again = trained(kind, remat, **how)
    rough = 2e-2 if how else 1e-5  # XLA fuses the repeated operations in another way, and rounds to bf16 elsewhere
    np.testing.assert_allclose(again, losses, rtol=rough)
    for name, value in values.items():
        np.testing.assert_allclose(values_again[name], value, rtol=rough, atol=2e-2 if how else 1e-6, err_msg=name)
    assert text.count("optimization_barrier") == 0
    assert text_again.count("optimization_barrier") >= NUM_BLOCKS


def kept_bytes(remat):
    """What lies between forward and backward."""
    stack = Stack(nnx.Rngs(0))
    stack.eval()
    graph, params, rest = nnx.split(stack, nnx.Param, ...)
    x = jnp.ones((512, WIDTH))

    def loss(params):
        module = nnx.merge(graph, params, rest, copy=True)
        if remat == "none":
            return module(x).mean()
        with recomputed_nnx(module, [f"blocks.{index}" for index in range(NUM_BLOCKS)], policy_of(remat)):
            return module(x).mean()

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_blocks_keep_their_inputs_alone_or_products_too():
    everything, products, inputs = map(kept_bytes, ("none", "dots", "full"))
    block = 512 * 4  # bytes per unit of width
    assert inputs <= NUM_BLOCKS * WIDTH * block * 1.5
    assert products >= inputs + NUM_BLOCKS * 32 * block
    assert everything > products


def test_a_class_has_its_own_call_again_and_other_instances_are_left_alone():
    before, other, module = Block.__call__, Block(nnx.Rngs(1)), Stack(nnx.Rngs(0))
    other.eval()
    with recomputed_nnx(module, ["blocks.0", "blocks.1"], None):
        assert Block.__call__ is not before
        assert "remat" not in str(jax.make_jaxpr(other)(jnp.ones((2, WIDTH))))
    assert Block.__call__ is before


def test_a_loss_that_calls_no_block_is_told_so(caplog):
    engine = open_engine(1, remat="full")
    model = engine.prepare_model(make("nnx"))
    engine.prepare_optimizer(optax.sgd(1e-2), model)

    def loss_of_the_head(model, batch):
        return model.head(batch["x"]).mean()

    with caplog.at_level(logging.WARNING, "polyaccel.jax"):
        loss_by_function(engine, loss_of_the_head, model, batches(1)[0])
    assert "calls neither Stack nor any of its repeated parts" in caplog.text
