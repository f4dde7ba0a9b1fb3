"""Small flax models, their losses and data for the tests of flax on torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

STEPS = 20
_random = np.random.default_rng(3)
IMAGES = _random.normal(size=(STEPS, 8, 6, 6, 1)).astype(np.float32)  # (step, batch, height, width, channel)
LABELS = _random.integers(0, 3, size=(STEPS, 8)).astype(np.int32)  # (step, batch)
BATCHES = [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS, strict=True)]


class CNN(nnx.Module):
    """Convolution, BatchNorm and dropout: parameters, statistics and random keys in one model."""

    def __init__(self, dropout=0.0, seed=0):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(6 * 6 * 4, 3, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images)))
        return self.head(self.dropout(x.reshape(len(x), -1)))


class MLP(nnx.Module):
    """No BatchNorm: any cut of a batch over processes gives the same gradients."""

    def __init__(self, seed=0, dropout=0.0):
        rngs = nnx.Rngs(seed)
        self.body = nnx.Linear(36, 16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, images):
        return self.head(self.dropout(nnx.relu(self.body(images.reshape(len(images), -1)))))


class LinenCNN(linen.Module):
    """The CNN in linen; its mode is an argument."""

    dropout: float = 0.0

    @linen.compact
    def __call__(self, images, train):
        x = linen.Conv(4, (3, 3))(images)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        x = linen.Dropout(self.dropout, deterministic=not train)(x.reshape(len(x), -1))
        return linen.Dense(3)(x)


def bound_linen(dropout=0.0):
    """A linen model with its variables."""
    module = LinenCNN(dropout)
    return module.bind(module.init(jax.random.key(0), jnp.asarray(IMAGES[0]), train=False))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"]).mean()


def linen_loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"], train=True), batch["label"]).mean()


def train(accelerator, model, optimizer, batches=BATCHES, *, max_norm=None, loss_fn=loss_fn):
    """The losses of a plain loop."""
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            losses.append(float(accelerator.backward(loss_fn, model, batch)))
            if max_norm is not None:
                accelerator.clip_grad_norm_(model, max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def values(module):
    """Every number of an nnx module by dotted name, random keys left out."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}
