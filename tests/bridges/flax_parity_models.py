"""The same three small models in nnx and in linen, their losses and data, for tests that hold two engines against each other.

No bias before a BatchNorm and none in attention: the loss does not depend on those, so that their gradients are nothing but rounding,
of which Adam makes steps of full size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

STEPS = 50
BATCH, CLASSES, LENGTH, VOCABULARY = 8, 3, 6, 11
_random = np.random.default_rng(4)
IMAGES = _random.normal(size=(STEPS, BATCH, 6, 6, 1)).astype(np.float32)  # (step, batch, height, width, channel)
TOKENS = _random.integers(0, VOCABULARY, size=(STEPS, BATCH, LENGTH)).astype(np.int32)  # (step, batch, time)
LABELS = _random.integers(0, CLASSES, size=(STEPS, BATCH)).astype(np.int32)  # (step, batch)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(36, 16, rngs=rngs), nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.body(images.reshape(len(images), -1))))


class NnxCNN(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.conv, self.norm = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(6 * 6 * 4, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images)))
        return self.head(self.dropout(x.reshape(len(x), -1)))


class NnxTransformer(nnx.Module):
    """One block: attention and a feed-forward layer, both behind a LayerNorm, mean over time, a head."""

    def __init__(self, rngs, width=16):
        self.token = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, width)))
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, use_bias=False, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 32, rngs=rngs), nnx.Linear(32, width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.token(tokens) + self.position[...]  # (batch, time, width)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, images, train):
        return linen.Dense(CLASSES)(linen.relu(linen.Dense(16)(images.reshape(len(images), -1))))


class LinenCNN(linen.Module):
    @linen.compact
    def __call__(self, images, train):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3), use_bias=False)(images)))
        return linen.Dense(CLASSES)(x.reshape(len(x), -1))


class LinenTransformer(linen.Module):
    width: int = 16

    @linen.compact
    def __call__(self, tokens, train):
        position = self.param("position", linen.initializers.normal(0.02), (LENGTH, self.width))
        x = linen.Embed(VOCABULARY, self.width)(tokens) + position  # (batch, time, width)
        x = x + linen.MultiHeadDotProductAttention(4, use_bias=False)(linen.LayerNorm()(x))
        x = x + linen.Dense(self.width)(linen.gelu(linen.Dense(32)(linen.LayerNorm()(x))))
        return linen.Dense(CLASSES)(x.mean(1))


_NNX = {"mlp": NnxMLP, "cnn": NnxCNN, "transformer": NnxTransformer}
_LINEN = {"mlp": LinenMLP, "cnn": LinenCNN, "transformer": LinenTransformer}


def make_model(library, kind):
    """A model with the same values at every call; a linen one bound to its variables."""
    if library == "nnx":
        return _NNX[kind](nnx.Rngs(0))
    module = _LINEN[kind]()
    return module.bind(module.init(jax.random.key(0), jnp.asarray(batches(kind)[0]["x"]), train=False))


def loss_of(library):
    """`loss_fn(model, batch)` of one library's models."""

    def nnx_loss(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"]).mean()

    def linen_loss(model, batch):
        logits = model(batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return nnx_loss if library == "nnx" else linen_loss


def batches(kind):
    """Fifty batches."""
    inputs = TOKENS if kind == "transformer" else IMAGES
    return [{"x": x, "label": label} for x, label in zip(inputs, LABELS, strict=True)]


def flat_values(module):
    """Every array of an nnx or a bound linen module by dotted path; random state left out."""
    if isinstance(module, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
        return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}
    paths = jax.tree_util.tree_flatten_with_path(module.variables)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value) for path, value in paths}
