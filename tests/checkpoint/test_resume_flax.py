"""Flax scripts that are cut in two: with nnx and linen, on the jax engine and on the torch engine, and from one to the other."""

from __future__ import annotations

import pytest

from polyaccel import Accelerator, set_seed
from polyaccel.registry import load_backend

pytest.importorskip("flax")
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

ENGINES = [name for name in ("jax", "torch") if load_backend(name).probe().is_usable]


class Shuffled:
    """Batches in an order of the epoch's own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(24, 8)).astype(np.float32)
        self.y = rng.integers(0, 4, 24).astype(np.int32)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        for rows in np.random.default_rng(self.epoch).permutation(24).reshape(3, 8):
            yield {"x": self.x[rows], "y": self.y[rows]}


class Nnx(nnx.Module):
    def __init__(self, dropout, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.tanh(self.norm(self.first(x)))))


class Linen(linen.Module):
    dropout: float

    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False)(linen.Dense(16)(x))
        return linen.Dense(4)(linen.Dropout(self.dropout, deterministic=False)(jnp.tanh(x)))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def train(backend, folder, kind, *, num_batches, save_at=None, load=False, dropout=0.0, fused=False, seed=0):
    """Losses of the batches of this call, and the model's arrays at the end."""
    set_seed(seed)
    accelerator = Accelerator(backend=backend, cpu=True, project_dir=folder, split_batches=True)
    if kind == "nnx":
        model = Nnx(dropout, nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, optax.adamw(optax.linear_schedule(3e-3, 1e-4, 20)), wrt=nnx.Param)
    else:
        module = Linen(dropout)
        keys = {"params": jax.random.key(seed), "dropout": jax.random.key(1)}
        model = module.bind(module.init(keys, jnp.zeros((1, 8))))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = accelerator.prepare_data_loader(Shuffled())
    if load:
        accelerator.load_state()
    step = accelerator.train_step(loss_fn, model, optimizer) if fused else None
    done = loader.epoch * len(loader) + loader.state.batch
    losses = []
    while done < num_batches:
        for batch in loader:
            if step is not None:
                losses.append(float(step(batch)))
            else:
                losses.append(float(accelerator.backward(loss_fn, model, batch)))
                optimizer.step()
                optimizer.zero_grad()
            done += 1
            if done == save_at:
                accelerator.save_state()
            if done == num_batches:
                break
    arrays = accelerator.get_state_dict(model)
    accelerator.end_training()
    return losses, arrays


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("backend", ENGINES)
def test_a_flax_run_cut_in_two_goes_on_bit_for_bit(backend, kind, tmp_path):
    fused = kind == "nnx"
    whole = train(backend, tmp_path, kind, num_batches=8, save_at=4, dropout=0.3, fused=fused)
    rest = train(backend, tmp_path, kind, num_batches=8, load=True, dropout=0.3, fused=fused, seed=7)
    assert rest[0] == whole[0][4:]
    assert rest[1].keys() == whole[1].keys()
    for name, array in whole[1].items():
        np.testing.assert_array_equal(rest[1][name], array, err_msg=name)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize(("origin", "goal"), [(a, b) for a in ENGINES for b in ENGINES if a != b])
def test_a_flax_run_goes_on_with_another_engine(origin, goal, kind, tmp_path):
    whole = train(origin, tmp_path, kind, num_batches=54, save_at=4)
    rest = train(goal, tmp_path, kind, num_batches=54, load=True, seed=7)
    np.testing.assert_allclose(rest[0], whole[0][4:], rtol=1e-5)
