"""Run in each process of a two-process gloo job by test_torch_processes.py: one function per question, answers as JSON.

Nothing is judged here. Every function is called on both processes, in this order.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch_network import X, Y, accelerator, mean_squared_error, network

from polyaccel.errors import PolyaccelError


def flat(model) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def prepared(run, batch_size=4, optimizer=torch.optim.AdamW, **options):
    # Process 1 starts from other weights: process 0's count.
    model = network(seed=7 + run.process_index)
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch_size)
    return run.prepare(model, optimizer(model.parameters(), lr=0.05, **options), loader)


def train(form: str, **options):
    run = accelerator(**options)
    model, optimizer, loader = prepared(run)
    step = run.train_step(mean_squared_error, model, optimizer, max_grad_norm=0.3)
    losses = []
    for _ in range(2):
        for batch in loader:
            if form == "train_step":
                losses.append(step(batch).item())
                continue
            with run.accumulate(model):
                if form == "function":
                    loss = run.backward(mean_squared_error, model, batch)
                else:
                    loss = mean_squared_error(model, batch)
                    run.backward(loss)
                    loss = run.reduce(loss.detach(), "mean")
                if run.sync_gradients:
                    run.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": losses, "weights": flat(run.unwrap_model(model))}


def value_form():
    return train("value")


def function_form():
    return train("function")


def train_step_form():
    return train("train_step")


def accumulated():
    return {form: train(form, gradient_accumulation_steps=2) for form in ("value", "function", "train_step")}


def bfloat16():
    return train("train_step", mixed_precision="bf16")


def compiled():
    return train("train_step", compile=True, compile_backend="aot_eager")


def compiled_and_accumulated():
    return train("value", compile=True, compile_backend="aot_eager", gradient_accumulation_steps=2)


def exchanges():
    """Gradient all-reduces seen by a communication hook: none may happen while accumulating."""
    run = accelerator(gradient_accumulation_steps=4)
    model, optimizer, loader = prepared(run, batch_size=2)
    counted = []

    def hook(state, bucket):
        counted.append(1)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)
    per_batch = []
    for batch in loader:
        before = len(counted)
        with run.accumulate(model):
            run.backward(mean_squared_error(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        per_batch.append(len(counted) - before)
    return per_batch


def overflow_on_one_process():
    run = accelerator(mixed_precision="fp16")
    run._engine._scaler.scaler._init_scale = 256.0
    model, optimizer, loader = prepared(run)
    skipped, scales = [], []
    first = next(model.parameters())
    for step, batch in enumerate(loader):
        is_bad = step == 0 and run.process_index == 1
        handle = first.register_hook(lambda grad: grad * float("inf")) if is_bad else None
        run.backward(mean_squared_error, model, batch)
        if handle is not None:
            handle.remove()
        scales.append(run._engine._scaler.scaler.get_scale())
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(run.optimizer_step_was_skipped)
    return {"skipped": skipped, "scales": scales, "weights": flat(run.unwrap_model(model))}


def auxiliary_values():
    def loss_fn(model, batch):
        output = model(batch[0])
        loss = nn.functional.mse_loss(output, batch[1])
        index = run.process_index
        return loss, {"rows": output, "rate": torch.tensor(float(index)), "seen": 2 + index, "flag": torch.tensor(True)}

    run = accelerator()
    model, optimizer, loader = prepared(run)
    result = run.train_step(loss_fn, model, optimizer)(next(iter(loader)))
    return {
        "rows": list(result["rows"].shape),
        "rate": result["rate"].item(),
        "seen": result["seen"].item(),
        "flag": result["flag"].item(),
        "loss": result["loss"].item(),
    }


def shuffled_orders():
    run = accelerator()
    torch.manual_seed(100 + run.process_index)
    orders = {}
    for name, generator in (("default", None), ("own", torch.Generator().manual_seed(run.process_index))):
        loader = run.prepare(DataLoader(torch.arange(22), batch_size=4, shuffle=True, generator=generator))
        orders[name] = [[batch.tolist() for batch in loader] for _ in range(2)]
    return orders


def shared_generators():
    run = accelerator(rng_types=["python", "torch"])
    torch.manual_seed(run.process_index)
    random.seed(run.process_index)
    list(run.prepare(DataLoader(torch.arange(8), batch_size=4)))
    return [random.random(), torch.rand(()).item()]


def metrics():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(22))

    run = accelerator()
    gathered = {}
    for name, loader in {
        "indexed": DataLoader(torch.arange(22), batch_size=4),
        "workers": DataLoader(torch.arange(22), batch_size=4, num_workers=1),
        "stream": DataLoader(Stream(), batch_size=4),
    }.items():
        gathered[name] = [run.gather_for_metrics(batch).tolist() for batch in run.prepare(loader)]
    return gathered


def collectives():
    run = accelerator()
    rank = run.process_index
    engine = run._engine.collectives
    square = torch.arange(6.0).view(2, 3) + rank
    return {
        "gather": engine.all_gather(square.t()).tolist(),
        "gather scalar": engine.all_gather(torch.tensor(rank)).tolist(),
        "gather bool": engine.all_gather(torch.tensor([rank == 0, True])).tolist(),
        "gather bfloat16": engine.all_gather(torch.tensor([rank], dtype=torch.bfloat16)).tolist(),
        "gather empty": list(engine.all_gather(torch.zeros(0, 3)).shape),
        "sum": engine.all_reduce(square, "sum").tolist(),
        "mean int": engine.all_reduce(torch.tensor([rank]), "mean").tolist(),
        "max": engine.all_reduce(torch.tensor([rank, -rank]), "max").tolist(),
        "min bool": engine.all_reduce(torch.tensor([rank == 0, True]), "min").tolist(),
        "sum bool": engine.all_reduce(torch.tensor([rank == 0, True]), "sum").tolist(),
        "broadcast": engine.broadcast(square.t(), 1).tolist(),
        "broadcast bool": engine.broadcast(torch.tensor([rank == 1]), 1).tolist(),
        "objects": engine.all_gather_object({"rank": rank, "text": "x" * (rank * 1000)}),
    }


def mistakes():
    run = accelerator()
    rank = run.process_index
    engine = run._engine.collectives
    attempts = {
        "shapes": lambda: engine.all_gather(torch.zeros(2 + rank)),
        "dtypes": lambda: engine.all_reduce(torch.zeros(2, dtype=[torch.float32, torch.int64][rank]), "sum"),
        "barriers": lambda: engine.barrier(["save", "load"][rank]),
        "split": lambda: accelerator(split_batches=True).prepare(DataLoader(X, batch_size=3)),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing was raised"
        except PolyaccelError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def states():
    run = accelerator()
    model, optimizer, loader = prepared(run)
    step = run.train_step(mean_squared_error, model, optimizer)
    step(next(iter(loader)))
    names = [shard.name for shard in run._engine.read_state(model)]
    slots = [shard.name for shard in run._engine.read_state(optimizer)]
    return {"model": names, "optimizer": slots}


def frozen_models_are_not_wrapped():
    run = accelerator()
    frozen = network().requires_grad_(False)
    evaluated = network()
    return [
        run.prepare(frozen) is frozen,
        run.prepare_model(evaluated, evaluation_mode=True) is evaluated,
        type(run.prepare(network())).__name__,
    ]


def left_and_joined_again() -> list[list[int]]:
    """Process 0 leaves late, and then process 1."""
    run, found = first, []
    for late in range(2):
        if run.process_index == late:
            time.sleep(0.5)
        run.end_training()
        run = accelerator()
        found.append(run.gather(torch.tensor([run.process_index])).tolist())
    return found


def a_process_that_does_not_come():
    run = accelerator()
    run._engine.collectives.calls.timeout_s = 1
    if run.process_index == 1:
        time.sleep(3)
        return "stayed away"
    try:
        run._engine.collectives.barrier("epoch end")
    except PolyaccelError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


QUESTIONS = (
    value_form,
    function_form,
    train_step_form,
    accumulated,
    bfloat16,
    compiled,
    compiled_and_accumulated,
    exchanges,
    overflow_on_one_process,
    auxiliary_values,
    shuffled_orders,
    shared_generators,
    metrics,
    collectives,
    mistakes,
    states,
    frozen_models_are_not_wrapped,
    left_and_joined_again,
    a_process_that_does_not_come,  # last: the group has failed afterwards
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    first = accelerator()
    answers = {question.__name__: question() for question in QUESTIONS}
    (folder / f"{first.process_index}.json").write_text(json.dumps(answers))
