"""What a Flax script costs per step on the torch engine, over hand-written jax and torch loops, interleaved in one run.

    python benchmarks/flax_on_torch.py            # a tiny MLP and a small transformer, JSON in benchmarks/results/

The tiny MLP (32-64-64-10, batch 16, AdamW) is nothing but overhead: per step the torch engine copies the new parameters into torch's
memory, and the separate calls cross the border between the frameworks once per parameter and pass.
"""

import argparse
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from interleaved import Contender, race, report, save
from overhead import BATCH, Jitted, NnxMLP, X, Y, adamw, mlp_loss, nnx_loss, nothing, torch_mlp

from polyaccel import Accelerator
from polyaccel_bridges.flax_to_torch import torch_module

WIDTH, HEADS, LENGTH, VOCABULARY = 128, 4, 64, 256


class Block(nnx.Module):
    """Attention and a feed-forward layer, both behind a LayerNorm."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Two blocks over 64 tokens, classified by their mean."""

    def __init__(self, rngs):
        self.token = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.first, self.second = Block(rngs), Block(rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.second(self.first(self.token(tokens))).mean(1))


def by_hand(model, batch):
    """`jax.jit` with donated state; plain nested dicts, the cheapest pytree there is."""
    graph, state = nnx.split(model)

    def loss(params, batch):
        nnx.replace_by_pure_dict(state, params)
        return nnx_loss(nnx.merge(graph, state), batch)

    step = Jitted(nnx.to_pure_dict(state), loss, batch, optax.adamw(1e-3))
    return Contender("hand-written jax.jit", step.step, step.wait)


def on_engine(backend, model, batch):
    accelerator = Accelerator(backend=backend, cpu=True)
    model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param))
    step = accelerator.train_step(nnx_loss, model, optimizer)
    return Contender(f"flax on {backend}: train_step", lambda: step(batch), accelerator._engine.synchronize)


def separate_calls(model, batch, *, torch_optimizer):
    accelerator = Accelerator(backend="torch", cpu=True)
    if torch_optimizer:
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.AdamW(torch_module(model).parameters(), lr=1e-3))
    else:
        model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param))

    def step():
        accelerator.backward(nnx_loss, model, batch)
        optimizer.step()
        optimizer.zero_grad()

    kind = "torch.optim" if torch_optimizer else "optax"
    return Contender(f"flax on torch: backward, step, {kind}", step, nothing)


def torch_by_hand():
    model = torch_mlp()
    optimizer = adamw(model, fused=True)
    batch = (torch.from_numpy(X), torch.from_numpy(Y))

    def step():
        mlp_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender("hand-written torch, the same MLP", step, nothing)


def contenders(make, batch):
    return [
        by_hand(make(nnx.Rngs(0)), batch),
        on_engine("jax", make(nnx.Rngs(0)), batch),
        on_engine("torch", make(nnx.Rngs(0)), batch),
        separate_calls(make(nnx.Rngs(0)), batch, torch_optimizer=False),
        separate_calls(make(nnx.Rngs(0)), batch, torch_optimizer=True),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "flax_on_torch.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "jax", "flax", "optax")
    results = {"versions": {name: importlib.metadata.version(name) for name in names}}
    batch = (jnp.asarray(X), jnp.asarray(Y.astype(np.int32)))
    results["mlp"] = report(
        f"tiny MLP, batch {BATCH}",
        race([*contenders(NnxMLP, batch), torch_by_hand()], rounds=args.rounds, steps=100),
        "hand-written jax.jit",
    )
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, VOCABULARY, (16, LENGTH)), jnp.int32)
    batch = (tokens, jnp.asarray(random.integers(0, 10, 16), jnp.int32))
    results["transformer"] = report(
        f"transformer 2 x {WIDTH}, {tokens.shape[0]} x {LENGTH} tokens",
        race(contenders(Transformer, batch), rounds=args.rounds, steps=4),
        "hand-written jax.jit",
    )
    results["device"] = str(jax.devices()[0])
    save(args.output, results)


if __name__ == "__main__":
    main()
