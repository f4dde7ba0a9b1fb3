"""What the tests of the jax adapter share: engines on some of the virtual devices, small models, data, and a loop by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from polyaccel.accumulation import GradientState
from polyaccel.config.resolve import resolve
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel.plan import make_plan
from polyaccel.protocols import LossCall, StepSpec
from polyaccel_jax.backend import JaxBackend
from polyaccel_jax.engine import JaxEngine


def open_engine(num_devices=1, *, seed=0, rendezvous=None, **settings):
    """A bound engine on the first devices; settings as of Accelerator."""
    config = resolve({"backend": "jax", "compilation_cache": "off", **settings}, {})
    if rendezvous is None:
        engine = JaxEngine(config, Rendezvous(), jax.devices()[:num_devices])
    else:
        engine = JaxEngine(config, rendezvous)
    return bound(engine, config, seed)


def bound(engine, config, seed=0):
    """The engine with the plan of its configuration, seeded."""
    known = JaxBackend.capabilities
    plan = make_plan(
        config,
        engine.topology,
        backend="jax",
        mesh_axes=known.mesh_axes,
        mixed_precision=known.mixed_precision,
        features=known.features,
    )
    engine.bind(plan)
    engine.gradient_state = GradientState(plan.gradient_accumulation_steps)
    engine.seed(seed)
    return engine


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


class Noisy(nnx.Module):
    """BatchNorm and dropout: state that changes in the forward pass, and random numbers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


class LinenNoisy(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.Dense(16, use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x))
        return linen.Dense(4)(x)


def batches(num_batches, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(size=(size, 8)).astype(np.float32), "y": rng.integers(0, 4, size).astype(np.int32)}
        for _ in range(num_batches)
    ]


def cross_entropy(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def loss_by_function(engine, loss_fn, *args, scale=1.0):
    """What accelerator.backward(loss_fn, *args) does."""
    return engine.backward(LossCall(loss_fn, args, {}), scale=scale)


def train(engine, model, optimizer, data, *, form="fused", loss_fn=cross_entropy, max_grad_norm=None, accumulation=1):
    """Losses of a training run in one of the two forms that flax has."""
    scale = 1 / accumulation
    fused = engine.train_step(StepSpec(loss_fn, model, model, optimizer, max_grad_norm=max_grad_norm, scale=scale))
    losses = []
    for number, batch in enumerate(data, start=1):
        sync = number % accumulation == 0
        if form == "fused":
            losses.append(fused(batch, sync))
            continue
        losses.append(loss_by_function(engine, loss_fn, model, batch, scale=scale))
        if sync:
            if max_grad_norm is not None:
                engine.clip_grad_norm(model, max_grad_norm, 2.0)
            optimizer.step()
            optimizer.zero_grad()
    return [float(loss["loss"] if isinstance(loss, dict) else loss) for loss in losses]


def train_by_hand(model, transformation, data, *, loss_fn=cross_entropy, clip=None, accumulation=1):
    """The loop that a flax user writes: nnx.value_and_grad, optax, nothing of polyaccel. Changes `model`."""
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    losses, total = [], None
    for number, batch in enumerate(data, start=1):
        loss, grads = nnx.value_and_grad(loss_fn)(model, jax.tree.map(jnp.asarray, batch))
        grads = jax.tree.map(lambda grad: grad / accumulation, grads)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        losses.append(float(loss))
        if number % accumulation == 0:
            if clip is not None:
                factor = jnp.minimum(clip / (optax.tree.norm(total) + 1e-6), 1.0)
                total = jax.tree.map(lambda grad, factor=factor: grad * factor, total)
            optimizer.update(model, total)
            total = None
    return losses


def weights(handle):
    """Copies of all parameters, by name."""
    return {name: np.array(value) for name, value in handle._polyaccel_model.params.items()}
