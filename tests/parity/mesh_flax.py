"""The GPT of examples/mesh_gpt.py in Flax, with the values of a torch one: what mesh_training.py trains as the form "flax"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from polyaccel import Accelerator

EPSILON = 1e-5  # torch's
WEIGHT_DECAY = 0.01  # torch's


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nnx.Linear(width, width, use_bias=False, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:  # (batch, time, width)
        q, k, v = (
            part(x).reshape(*x.shape[:2], self.heads, -1) for part in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, time, heads, head)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up_proj = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down_proj = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.gelu(self.up_proj(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attention, self.mlp = Attention(width, heads, rngs), Mlp(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FlaxGpt(nnx.Module):
    """(batch, time) -> (batch, time, vocabulary). Its names and values are those of `like`, a GPT of examples/mesh_gpt.py."""

    def __init__(self, like: Any) -> None:
        rngs = nnx.Rngs(0)
        (vocabulary, width), context = like.embed_tokens.weight.shape, like.embed_positions.weight.shape[0]
        self.embed_tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.embed_positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, block.attention.heads, rngs) for block in like.blocks])
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)
        for path, layer in like.named_modules():
            for name, value in layer.named_parameters(recurse=False):
                self._take(path, layer, name, value.detach().numpy())

    def _take(self, path: str, layer: torch.nn.Module, name: str, value: np.ndarray[Any, Any]) -> None:
        own: Any = self
        for part in path.split("."):
            own = own[int(part)] if part.isdecimal() else getattr(own, part)
        kinds = {torch.nn.Linear: "kernel", torch.nn.Embedding: "embedding", torch.nn.LayerNorm: "scale"}
        is_kernel = name == "weight" and isinstance(layer, torch.nn.Linear)  # torch stores (out, in)
        key = kinds[type(layer)] if name == "weight" else name
        assert getattr(own, key).shape == (value.T if is_kernel else value).shape
        setattr(own, key, nnx.Param(jnp.asarray(value.T if is_kernel else value)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed_tokens(ids) + self.embed_positions(jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def next_byte_loss(model: Any, batch: Any) -> jax.Array:
    ids, targets = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(ids), targets).mean()


def shapes_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """By the names that the engine gives parameters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): tuple(value.shape) for path, value in flat}


def train(
    accelerator: Accelerator, make: Callable[[], Any], batches: Iterable[Any], max_norm: float
) -> tuple[list[float], Any, Any, dict[str, tuple[int, ...]]]:
    """Losses of so many batches (of torch tensors), the model, the optimizer and the shapes of the parameters."""
    model = FlaxGpt(make())
    shapes = shapes_of(model)
    model, optimizer = accelerator.prepare(model, optax.adamw(1e-3, weight_decay=WEIGHT_DECAY))
    step = accelerator.train_step(next_byte_loss, model, optimizer, max_grad_norm=max_norm)
    losses = [float(step(tuple(part.numpy().astype(np.int32) for part in batch))) for batch in batches]
    return losses, model, optimizer, shapes
