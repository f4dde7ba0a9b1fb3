"""One process of a job of two, two devices each; prints what test_jax_processes.py compares. Not a test itself."""

import json
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax_engines import Noisy, batches, cross_entropy, loss_by_function, open_engine, train, weights

from polyaccel.errors import UnsupportedError
from polyaccel.launch.rendezvous import from_environment
from polyaccel.protocols import LoaderSpec, StepSpec


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def mine(batch, rank, num_processes):
    size = len(batch["y"]) // num_processes
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def training(partitioning, rendezvous):
    engine = open_engine(partitioning=partitioning, rendezvous=rendezvous)
    topology = engine.topology
    model = engine.prepare_model(Plain(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.adam(1e-2), model)
    data = [mine(batch, topology.process_index, topology.num_processes) for batch in batches(8)]
    losses = train(engine, model, optimizer, data[:4], max_grad_norm=0.5, accumulation=2)
    losses += train(engine, model, optimizer, data[4:], form="function")

    def with_outputs(model, batch):
        logits = model(batch["x"])
        hits = (logits.argmax(-1) == batch["y"]).sum()
        return cross_entropy(model, batch), {"logits": logits, "hits": hits}

    loss, aux = loss_by_function(engine, with_outputs, model, data[0])
    loader = engine.prepare_loader([{"x": np.full((2, 1), i, np.float32)} for i in range(6)], LoaderSpec())
    seen, whole = [], []
    for batch in loader:
        seen.append(engine.to_host(batch["x"]).ravel().tolist())
        whole.append(np.asarray(engine.collectives.all_gather(batch["x"])).ravel().tolist())
    try:
        engine.collectives.all_reduce(batch["x"], "mean")
        refused = "not at all"
    except UnsupportedError as error:
        refused = error.message
    shards = [[s.name, list(s.offset), s.data.size] for s in engine.read_state(model)]
    fused = engine.train_step(StepSpec(with_outputs, model, model, optimizer))
    return engine, {
        "topology": [topology.process_index, topology.num_processes, topology.num_devices, topology.num_local_devices],
        "losses": losses,
        "weight": weights(model)["first.kernel"].ravel()[:4].tolist(),
        "loss": float(loss),
        "hits": int(aux["hits"]),
        "logits": np.asarray(aux["logits"]).shape,
        "fused hits": int(fused(data[0], True)["hits"]),
        "outputs": list(model(data[0]["x"]).shape),
        "seen": seen,
        "whole": whole,
        "refused": refused,
        "shards": shards,
    }


def collectives(engine):
    rank = engine.topology.process_index
    both = engine.collectives
    result = {
        "gather": np.asarray(both.all_gather(np.array([rank, 10 + rank]))).tolist(),
        "gather scalar": np.asarray(both.all_gather(jax.numpy.float32(rank))).tolist(),
        "sum": np.asarray(both.all_reduce(np.array([rank + 1.0]), "sum")).tolist(),
        "mean": np.asarray(both.all_reduce(np.array([rank + 1.0]), "mean")).tolist(),
        "max": np.asarray(both.all_reduce(np.array([rank]), "max")).tolist(),
        "broadcast": np.asarray(both.broadcast(np.array([rank]), 1)).tolist(),
        "objects": both.all_gather_object({"rank": rank, "text": "x" * (rank + 1)}),
        "wide": int(both.all_gather(np.array([2**40 + rank]))[1]),
    }
    both.barrier("done")
    return result


def noisy(rendezvous):
    engine = open_engine(partitioning="pmap", rendezvous=rendezvous, seed=rendezvous.process_index + 1)
    model = engine.prepare_model(Noisy(nnx.Rngs(0)))
    optimizer = engine.prepare_optimizer(optax.sgd(0.1), model)
    topology = engine.topology
    data = [mine(batch, topology.process_index, topology.num_processes) for batch in batches(3)]
    losses = train(engine, model, optimizer, data)
    return {
        "noisy": losses,
        "statistics": np.asarray(engine.to_host(model._polyaccel_model.buffers["norm.mean"])).tolist(),
    }


def main():
    rendezvous = from_environment()
    engine, result = training(sys.argv[1], rendezvous)
    result |= collectives(engine)
    result |= noisy(rendezvous)
    print("RESULT " + json.dumps(result))
    engine.close()


main()
