"""Run by test_flax_to_torch.py in a job of one or two processes: trains on one global batch and writes what came out."""

import sys

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from flax_examples import BATCHES, MLP, bound_linen, linen_loss_fn, loss_fn, train, values

from polyaccel import Accelerator, set_seed
from polyaccel_bridges.flax_to_torch import torch_module

set_seed(0)
accelerator = Accelerator(split_batches=True, gradient_accumulation_steps=2)
model = MLP(seed=accelerator.process_index)  # process 0's values count
model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param))
loader = accelerator.prepare_data_loader(BATCHES)
losses = train(accelerator, model, optimizer, loader, max_norm=0.5)
result = {"losses": np.array(losses), **values(accelerator.unwrap_model(model))}

step = accelerator.train_step(lambda m, b: (loss_fn(m, b), {"n": b["label"].size}), model, optimizer)
metrics = next(step(batch) for batch in loader)
result["step_loss"], result["n"] = np.asarray(metrics["loss"]), np.asarray(metrics["n"])

labels = [accelerator.gather_for_metrics(batch["label"]) for batch in loader]
result["labels"] = np.concatenate(labels)

# Only the head is trained; DistributedDataParallel still waits for every parameter of the model.
half = MLP()
half, optimizer = accelerator.prepare(half, nnx.Optimizer(half, optax.sgd(0.1), wrt=nnx.PathContains("head")))
train(accelerator, half, optimizer, loader)
result |= {f"half.{name}": value for name, value in values(accelerator.unwrap_model(half)).items()}

# One more model, used in one loss with the first: both take part in the exchange.
teacher = accelerator.prepare(MLP(seed=5))


def distance(student, teacher, batch):
    return ((student(batch["image"]) - teacher(batch["image"])) ** 2).mean()


for batch in loader:
    accelerator.backward(distance, half, teacher, batch)
    optimizer.step()
    optimizer.zero_grad()
result |= {f"taught.{name}": value for name, value in values(accelerator.unwrap_model(half)).items()}

# A torch optimizer over a flax model's parameters, whose gradients DistributedDataParallel averages.
torched = accelerator.prepare(MLP(seed=accelerator.process_index))
optimizer = accelerator.prepare(torch.optim.AdamW(torch_module(torched).parameters(), lr=1e-2, eps=1e-6))
train(accelerator, torched, optimizer, loader, max_norm=0.5)
result |= {f"torched.{name}": value for name, value in values(accelerator.unwrap_model(torched)).items()}

# Replicas drop different neurons: the same samples everywhere give different losses.
one = {name: array[:4] for name, array in BATCHES[0].items()}


for name, prepared, function in (
    ("nnx", accelerator.prepare(MLP(dropout=0.5)), loss_fn),
    ("linen", accelerator.prepare(bound_linen(dropout=0.5)), linen_loss_fn),
):
    _, aux = accelerator.backward(lambda m, b, f=function: (f(m, b), {"own": f(m, b)[None]}), prepared, one)
    result[f"dropped.{name}"] = np.asarray(accelerator.gather(aux["own"]))

# The random keys of process 0 count: a state that is read there is the state of all.
keyed = accelerator.prepare(MLP(seed=accelerator.process_index, dropout=0.5))
own = {name: torch.from_numpy(array.astype(np.int64)) for name, array in torch_module(keyed).read_arrays().items()}
assert set(own) == {"dropout.rngs.key", "dropout.rngs.count"}
for name, words in own.items():
    gathered = accelerator.gather(jnp.asarray(words.numpy().astype(np.uint32).view(np.int32))[None])
    assert (gathered == gathered[0]).all(), name

if accelerator.is_main_process:
    np.savez(sys.argv[1], **result)
accelerator.end_training()
