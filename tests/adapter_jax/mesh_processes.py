"""One process of a job on a mesh with fsdp and tensor axes; prints what test_jax_mesh_processes.py compares. Not a test itself."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from answering import answer, run_job
from flax import linen, nnx
from jax_engines import Mlp, batches, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import EMA, Accelerator, ShardingRule
from polyaccel.errors import PrepareError, UnsupportedError

sys.path.append(str(Path(__file__).parents[1] / "adapter_torch"))
from small_gpt import LENGTH, VOCABULARY, Gpt, loss_fn

MAX_NORM, SIZE = 0.5, 16
RULES = [ShardingRule("*first.kernel", (None, "tensor")), ShardingRule("*second.kernel", ("tensor", None))]


class Odd(nnx.Module):
    """With a parameter that divides by nothing."""

    def __init__(self, rngs):
        self.inner = Mlp(rngs)
        self.odd = nnx.Param(jnp.zeros((3, 5)))

    def __call__(self, x):
        return self.inner(x) * (1 + self.odd[...].sum())


def accelerator(mesh, folder=None, **settings):
    settings = {"split_batches": True, "compilation_cache": "off", "sharding_rules": RULES, **settings}
    return Accelerator(backend="jax", mesh=mesh, cpu=True, project_dir=folder, **settings)


def refused(function, kind=UnsupportedError):
    try:
        function()
    except kind as error:
        return str(error)
    return "not at all"


def bytes_of(arrays):
    """Of this process's first device."""
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


# -- flax --------------------------------------------------------------------------------------------------------------


def flax(mesh, partitioning, folder):
    """Ten fused steps, ten by backward in windows of two, averages, reading, saving and going on elsewhere."""
    data = batches(20)
    run = accelerator(mesh, folder, partitioning=partitioning)
    # Each process makes other values: those of process 0 count.
    model, optimizer = run.prepare(Odd(nnx.Rngs(run.process_index)), optax.adamw(1e-2))
    loader = run.prepare_data_loader(data)
    ema = EMA(model, decay=0.5)
    step = run.train_step(cross_entropy, model, optimizer, max_grad_norm=MAX_NORM)
    losses = []
    for number, batch in enumerate(loader):
        if number < 10:
            losses.append(step(batch))
        else:
            losses.append(run.backward(cross_entropy, model, batch))
            run.clip_grad_norm_(model, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
    held = model._polyaccel_model
    result = {
        "losses": [float(loss) for loss in losses],
        "parameter bytes": bytes_of(held.leaves),
        "state bytes": bytes_of(optimizer._polyaccel_optimizer.leaves),
        "state": _listed(run.get_state_dict(model)),
        "averages": _listed(ema.state_dict()["averages"]),
    }
    run.register_for_checkpointing(ema)
    result["path"] = run.save_state(str(Path(folder) / "flax"))
    run.save_model(model, Path(folder) / "weights")
    result["following"] = float(run.backward(cross_entropy, model, next(iter(loader))))
    result["gradient bytes"] = bytes_of(held.grads.values())
    with ema.applied():
        result["applied"] = _listed(run.get_state_dict(model))["inner.first.bias"]
    result["again"] = _listed(run.get_state_dict(model)) == result["state"]
    return result


def flax_accumulation(mesh, partitioning):
    """Eight micro batches in windows of two, clipped."""
    run = accelerator(mesh, partitioning=partitioning, gradient_accumulation_steps=2)
    model, optimizer = run.prepare(Odd(nnx.Rngs(0)), optax.adamw(1e-2))
    loader = run.prepare_data_loader(batches(8))
    losses, norms = [], []
    for batch in loader:
        with run.accumulate(model):
            losses.append(run.backward(cross_entropy, model, batch))
            norms.append(run.clip_grad_norm_(model, MAX_NORM) if run.sync_gradients else None)
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": [float(loss) for loss in losses], "norm": float(norms[-1])}


def flax_precision(mesh, precision):
    run = accelerator(mesh, mixed_precision=precision)
    model, optimizer = run.prepare(Mlp(nnx.Rngs(0)), optax.sgd(0.1))
    loader = run.prepare_data_loader(batches(4))
    step = run.train_step(cross_entropy, model, optimizer)
    return [float(step(batch)) for batch in loader]


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.tanh(linen.Dense(16)(x)))


def linen_model():
    module = LinenMlp()
    return module.bind(module.init(jax.random.key(0), jnp.zeros((1, 8))))


def linen_bf16(mesh):
    """Four fused steps of a linen module in bf16, and its predictions for batches of unequal sizes."""
    run = accelerator(mesh, mixed_precision="bf16", sharding_rules=())
    model, optimizer = run.prepare(linen_model(), optax.sgd(0.1))
    step = run.train_step(cross_entropy, model, optimizer)
    losses = [float(step(batch)) for batch in run.prepare_data_loader(batches(4))]
    data = [
        {"x": batches(1)[0]["x"][:SIZE], "id": np.arange(SIZE)},
        {"x": batches(1)[0]["x"][:12], "id": np.arange(12)},
    ]
    seen = []
    for batch in run.prepare_data_loader(data):
        logits, ids = run.gather_for_metrics((model(batch["x"]), batch["id"]))
        seen.append((np.asarray(logits, np.float32).ravel().tolist(), np.asarray(ids).tolist()))
    held = model._polyaccel_model.leaves
    return {
        "losses": losses,
        "ids": [ids for _, ids in seen],
        "logits": [logits for logits, _ in seen],
        "kept": sorted({leaf.dtype.name for leaf in held}),
        "bytes": bytes_of(held),
    }


def flax_resumed(mesh, partitioning, path):
    """What another mesh reads of a checkpoint, and the next loss."""
    run = accelerator(mesh, partitioning=partitioning)
    model, optimizer = run.prepare(Odd(nnx.Rngs(5)), optax.adamw(1e-2))
    loader = run.prepare_data_loader(batches(20))
    ema = EMA(model, decay=0.5)
    run.register_for_checkpointing(ema)
    run.load_state(path)
    saved = run.get_state_dict(model)
    state = {}  # sums over this process's pieces
    for shard in run._engine.read_state(optimizer):
        state[shard.name] = state.get(shard.name, 0.0) + shard.data.sum(dtype=np.float64).item()
    return {
        "state": _listed(saved),
        "averages": _listed(ema.state_dict()["averages"]),
        "optimizer": state,
        "following": float(run.backward(cross_entropy, model, next(iter(loader)))),
    }


def flax_created(mesh):
    run = accelerator(mesh)
    whole = Odd(nnx.Rngs(3))
    model = run.prepare(run.create_model(lambda: Odd(nnx.Rngs(3))))
    state = run.get_state_dict(model)
    expected = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(whole))}
    gap = max(float(np.abs(state[name] - np.asarray(value)).max()) for name, value in expected.items())
    return {"gap": gap, "bytes": bytes_of(model._polyaccel_model.leaves)}


def metrics(mesh):
    """Every sample once, whatever number of processes has it."""
    run = accelerator(mesh, split_batches=False)
    shards = run.num_data_shards
    numbers = np.arange(10 * shards - 3)
    size = 4
    parts = [{"id": numbers[start : start + size]} for start in range(0, len(numbers), size)]
    run.prepare(Mlp(nnx.Rngs(0)))
    flax_loader = run.prepare_data_loader(parts)
    flax_seen = [run.gather_for_metrics(batch["id"]) for batch in flax_loader]
    run = accelerator(mesh, split_batches=False)
    _, loader = run.prepare(torch.nn.Linear(2, 2), DataLoader(TensorDataset(torch.tensor(numbers)), batch_size=4))
    seen, objects = [], []
    for (batch,) in loader:
        seen += run.gather_for_metrics(batch).tolist()
        objects += run.gather_for_metrics([str(number) for number in batch.tolist()])
    return {
        "flax": np.concatenate([np.asarray(part) for part in flax_seen]).tolist(),
        "torch": seen,
        "objects": objects,
        "count": len(numbers),
    }


def other_rows(mesh):
    """What happens where two processes of one data shard are given different rows."""
    run = accelerator(mesh)
    model = run.prepare(Mlp(nnx.Rngs(0)))
    batch = batches(1, seed=run.process_index)[0]
    return refused(lambda: run.backward(cross_entropy, model, batch), PrepareError)


# -- torch -------------------------------------------------------------------------------------------------------------


def gpt(seed):
    torch.manual_seed(seed)
    model = Gpt()
    model.blocks = model.blocks[:1]
    torch.nn.init.normal_(model.tokens.weight, std=0.1)
    return model


def tokens(num_batches):
    made = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (num_batches * SIZE, LENGTH + 1), generator=made)


def torch_gpt(mesh, partitioning, folder):
    """Ten steps of a recorded loop, five of a loss function, five fused."""
    run = accelerator(mesh, folder, partitioning=partitioning)
    model = gpt(run.process_index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = run.prepare(model, optimizer, DataLoader(tokens(20), batch_size=SIZE))
    step = run.train_step(loss_fn, model, optimizer, max_grad_norm=MAX_NORM)
    losses, norms = [], []
    for number, batch in enumerate(loader):
        if number >= 15:
            losses.append(step(batch))
            continue
        if number < 10:
            loss = loss_fn(model, batch)
            run.backward(loss)
            losses.append(run.reduce(loss.detach(), "mean"))
        else:
            losses.append(run.backward(loss_fn, model, batch))
        norms.append(run.clip_grad_norm_(model.parameters(), MAX_NORM))
        if number == 14:
            held = bytes_of(model._model.handle.gradients.values())
        optimizer.step()
        optimizer.zero_grad()
    state = run.get_state_dict(model)
    result = {
        "losses": [float(loss) for loss in losses],
        "norms": [float(norm) for norm in norms],
        "parameter bytes": bytes_of(model._model.handle.leaves),
        "gradient bytes": held,
        "state": _listed({name: value.numpy() for name, value in state.items()}),
        "keys": list(state) == list(model.state_dict()),
        "path": run.save_state(str(Path(folder) / "torch")),
    }
    is_cut = any(not leaf.is_fully_replicated for leaf in model._model.handle.leaves)
    later = next(iter(loader))
    run.backward(loss_fn, model, later)  # what was read before is no longer the present value
    gradient = model.head.weight.grad
    result["refused"] = [
        refused(lambda: gradient.norm().item()),
        refused(lambda: optimizer.state_dict()),
    ]
    optimizer.step()
    result["refused"].append(refused(lambda: model.head.weight.tolist()))
    result["is cut"] = is_cut
    with torch.no_grad():
        loaded = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    model.load_state_dict(loaded)
    result["loaded"] = _listed({n: v.numpy() for n, v in run.get_state_dict(model).items()}) == result["state"]
    return result


def torch_resumed(mesh, partitioning, path):
    run = accelerator(mesh, partitioning=partitioning)
    model = gpt(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = run.prepare(model, optimizer, DataLoader(tokens(20), batch_size=SIZE))
    run.load_state(path)
    state = run.get_state_dict(model)
    following = run.backward(loss_fn, model, next(iter(loader)))
    return {
        "state": _listed({name: value.detach().numpy() for name, value in state.items()}),
        "following": float(following),
    }


def _listed(state):
    return {name: np.asarray(value).ravel().astype(float).tolist() for name, value in state.items()}


def plain_torch(make, data, loss_fn):
    """(model, losses, gradient norms) of the loop that a torch user writes on one device, with clipping."""
    model = make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for batch in data:
        loss = loss_fn(model, batch)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, norms


def main():
    torch.set_num_threads(1)
    answer(accelerator(None), globals(), jax.clear_caches)  # the job ends with the last Accelerator


if __name__ == "__main__":
    run_job(main)
