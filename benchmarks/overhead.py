"""What the layer costs per step, over the hand-written loop of the same framework, interleaved in one run.

    python benchmarks/overhead.py                 # all groups, a table each, JSON in benchmarks/results/
    python benchmarks/overhead.py --only torch_mlp jax_mlp

Groups: a tiny MLP (32-64-64-10, batch 16, AdamW), where a step is nothing but overhead, and the byte GPT of the examples. On torch
beside Hugging Face Accelerate and Lightning Fabric; on jax beside hand-written `jax.jit` with donated state and `nnx.jit`.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from interleaved import Contender, race, report, save
from torch.utils.data import DataLoader

from polyaccel import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from byte_gpt import CONTEXT, GPT, next_byte_loss

BATCH = 16
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(BATCH, 32)).astype(np.float32), RNG.integers(0, 10, BATCH)
WINDOW = RNG.integers(0, 256, (8, CONTEXT + 1))


def torch_mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )


def mlp_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def adamw(model, **flags):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **flags)


def nothing():
    return None


def torch_contenders(make_model, loss_fn, batch):
    """The same model and batch in every torch loop; each contender has its own copy."""
    import accelerate
    import lightning_fabric

    def by_hand(**flags):
        model = make_model()
        optimizer = adamw(model, **flags)

        def step():
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def with_accelerator(accelerator):
        model = make_model()
        model, optimizer = accelerator.prepare(model, adamw(model, fused=True))

        def step():
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def with_fabric():
        fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
        model = make_model()
        model, optimizer = fabric.setup(model, adamw(model, fused=True))

        def step():
            loss = loss_fn(model, batch)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def fused_step():
        accelerator = Accelerator(backend="torch", cpu=True)
        model = make_model()
        model, optimizer = accelerator.prepare(model, adamw(model))
        step = accelerator.train_step(loss_fn, model, optimizer)
        return lambda: step(batch)

    return [
        Contender("hand-written, fused AdamW", by_hand(fused=True), nothing),
        Contender("hand-written, default AdamW", by_hand(), nothing),
        Contender("polyaccel backward(loss)", with_accelerator(Accelerator(backend="torch", cpu=True)), nothing),
        Contender("polyaccel train_step", fused_step(), nothing),
        Contender("accelerate", with_accelerator(accelerate.Accelerator(cpu=True)), nothing),
        Contender("fabric", with_fabric(), nothing),
    ]


# -- jax ---------------------------------------------------------------------------------------------------------------------


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.c = (
            nnx.Linear(32, 64, rngs=rngs),
            nnx.Linear(64, 64, rngs=rngs),
            nnx.Linear(64, 10, rngs=rngs),
        )

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


def nnx_loss(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


class Jitted:
    """A hand-written step: `jax.jit` with parameters and optimizer state donated, held by this object."""

    def __init__(self, params, loss, batch, tx):
        self.state, self.batch = (params, tx.init(params)), batch

        def step(state, batch):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        self.jitted = jax.jit(step, donate_argnums=0)

    def step(self):
        self.state, self.loss = self.jitted(self.state, self.batch)

    def wait(self):
        jax.block_until_ready(self.state)


def prepared_step(model, optimizer, loss_fn, batch, **options):
    """A fused step on one batch; a torch batch comes from a prepared loader, which has placed it, as the arrays by hand are."""
    accelerator = Accelerator(backend="jax", cpu=True, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(batch, DataLoader):
        batch = next(iter(accelerator.prepare(batch)))
    step = accelerator.train_step(loss_fn, model, optimizer)
    holder = {}

    def run():
        holder["loss"] = step(batch)

    # The update of the parameters belongs to the step: wait for it, not only for the loss.
    return run, accelerator._engine.synchronize


def jax_mlp_contenders():
    batch = (jnp.asarray(X), jnp.asarray(Y))
    graph, state = nnx.split(NnxMLP(nnx.Rngs(0)))
    # Plain nested dicts, the cheapest pytree there is: an nnx.State costs 100 us more per call.
    params = nnx.to_pure_dict(state)

    def loss(params, batch):
        nnx.replace_by_pure_dict(state, params)
        return nnx_loss(nnx.merge(graph, state), batch)

    by_hand = Jitted(params, loss, batch, optax.adamw(1e-3))

    model = NnxMLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return loss

    flax_model = NnxMLP(nnx.Rngs(0))
    flax = prepared_step(flax_model, nnx.Optimizer(flax_model, optax.adamw(1e-3), wrt=nnx.Param), nnx_loss, batch)
    torch_model = torch_mlp()
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    bridged = prepared_step(torch_model, adamw(torch_model), mlp_loss, DataLoader(rows, batch_size=BATCH))
    return [
        Contender("hand-written jax.jit", by_hand.step, by_hand.wait),
        Contender(
            "nnx.jit", lambda: nnx_step(model, optimizer, batch), lambda: jax.block_until_ready(nnx.state(model))
        ),
        Contender("polyaccel train_step, flax", *flax),
        Contender("polyaccel train_step, torch on jax", *bridged),
    ]


def library_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def plain_attention(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5  # (batch, heads, time, time)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def gpt_by_hand(attention):
    """The examples' GPT in plain jnp, with the weights of the torch model."""
    torch.manual_seed(0)
    model = GPT()
    params = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}

    def norm(x, name, p):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(x, name, p):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def loss(p, window):
        ids, targets = window[:, :-1], window[:, 1:]
        x = p["token.weight"][ids] + p["position.weight"][: ids.shape[1]]  # (batch, time, width)
        for block in (f"blocks.{i}" for i in range(4)):
            qkv = dense(norm(x, f"{block}.norm1", p), f"{block}.qkv", p)
            q, k, v = jnp.moveaxis(qkv.reshape(*ids.shape, 3, 4, -1), 2, 0)  # (batch, time, heads, head)
            y = attention(q, k, v)
            x = x + dense(y.reshape(x.shape), f"{block}.out", p)
            x = x + dense(
                jax.nn.gelu(dense(norm(x, f"{block}.norm2", p), f"{block}.up", p), approximate=False),
                f"{block}.down",
                p,
            )
        logits = norm(x, "norm", p) @ p["token.weight"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return params, loss


def jax_gpt_contenders():
    tx = optax.adamw(1e-3, weight_decay=1e-2)
    by_hand = Jitted(*gpt_by_hand(plain_attention), jnp.asarray(WINDOW), tx)
    with_library = Jitted(*gpt_by_hand(library_attention), jnp.asarray(WINDOW), tx)
    torch.manual_seed(0)
    model = GPT()
    windows = DataLoader(torch.from_numpy(WINDOW), batch_size=len(WINDOW))
    bridged = prepared_step(model, adamw(model), next_byte_loss, windows)
    return [
        Contender("hand-written jax.jit", by_hand.step, by_hand.wait),
        Contender("same, jax.nn.dot_product_attention", with_library.step, with_library.wait),
        Contender("polyaccel train_step, torch on jax", *bridged),
    ]


GROUPS = {
    "torch_mlp": (
        "tiny MLP on torch",
        lambda: torch_contenders(torch_mlp, mlp_loss, (torch.from_numpy(X), torch.from_numpy(Y))),
        "hand-written, fused AdamW",
        {"rounds": 21, "steps": 200},
    ),
    "torch_gpt": (
        "byte GPT on torch",
        lambda: torch_contenders(GPT, next_byte_loss, torch.from_numpy(WINDOW)),
        "hand-written, fused AdamW",
        {"rounds": 15, "steps": 4},
    ),
    "jax_mlp": ("tiny MLP on jax", jax_mlp_contenders, "hand-written jax.jit", {"rounds": 21, "steps": 300}),
    "jax_gpt": ("byte GPT on jax", jax_gpt_contenders, "hand-written jax.jit", {"rounds": 11, "steps": 4}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "overhead.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "jax", "flax", "optax", "accelerate", "lightning-fabric")
    results = {"versions": {name: importlib.metadata.version(name) for name in names}}
    for name in args.only:
        title, contenders, baseline, size = GROUPS[name]
        results[name] = report(title, race(contenders(), **size), baseline)
    save(args.output, results)


if __name__ == "__main__":
    main()
