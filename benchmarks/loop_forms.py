"""What an unmodified torch loop costs on jax over the fused `train_step` of the same model, interleaved in one run.

    python benchmarks/loop_forms.py                 # all groups, a table each, JSON in benchmarks/results/
    python benchmarks/loop_forms.py --only mlp gpt

Every form clips by norm and updates with AdamW. Groups: a tiny MLP (32-64-64-10, batch 16), where a step is nothing but overhead;
the byte GPT of the examples (8 x 128 bytes); a BERT of 4 layers and 256 features (8 x 64 tokens). `per_operation` is the time that
Python takes to record one further operation of the loss, from a second step on.
"""

import argparse
import importlib.metadata
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from interleaved import Contender, race, report, save
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from byte_gpt import CONTEXT, GPT

MAX_NORM = 1.0
RNG = np.random.default_rng(0)


def mlp():
    return torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def mlp_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def gpt_loss(model, batch):
    (window,) = batch
    logits = model(window[:, :-1])  # (batch, time, 256)
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def bert_loss(model, batch):
    ids, mask, labels = batch
    return F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)


def rows(*arrays):
    return DataLoader(TensorDataset(*[torch.from_numpy(array) for array in arrays]), batch_size=len(arrays[0]))


GROUPS = {
    "mlp": (
        "tiny MLP",
        mlp,
        mlp_loss,
        rows(RNG.normal(size=(16, 32)).astype(np.float32), RNG.integers(0, 10, 16)),
        {"rounds": 21, "steps": 200},
    ),
    "gpt": (
        "byte GPT, 8 x 128",
        GPT,
        gpt_loss,
        rows(RNG.integers(0, 256, (8, CONTEXT + 1))),
        {"rounds": 15, "steps": 4},
    ),
    "bert": (
        "BERT-mini, 8 x 64",
        bert,
        bert_loss,
        rows(RNG.integers(0, 1000, (8, 64)), np.ones((8, 64), np.int64), RNG.integers(0, 2, 8)),
        {"rounds": 15, "steps": 4},
    ),
}


def prepared(make_model, loader):
    torch.manual_seed(0)
    accelerator = Accelerator(backend="jax", cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, model, optimizer, next(iter(loader))


def contenders(make_model, loss_fn, loader):
    def fused():
        accelerator, model, optimizer, batch = prepared(make_model, loader)
        step = accelerator.train_step(loss_fn, model, optimizer, max_grad_norm=MAX_NORM)
        return (lambda: step(batch)), accelerator._engine.synchronize

    def function():
        accelerator, model, optimizer, batch = prepared(make_model, loader)

        def step():
            accelerator.backward(loss_fn, model, batch)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

        return step, accelerator._engine.synchronize

    def loop(*, early=False, late=False):
        accelerator, model, optimizer, batch = prepared(make_model, loader)

        def step():
            loss = loss_fn(model, batch)
            if early:
                loss.item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if late:
                loss.item()

        return step, accelerator._engine.synchronize

    return [
        Contender("train_step(batch)", *fused()),
        Contender("backward(loss_fn, model, batch)", *function()),
        Contender("the loop, backward(loss)", *loop()),
        Contender("the loop, loss.item() after the step", *loop(late=True)),
        Contender("the loop, loss.item() before backward", *loop(early=True)),
    ]


def per_operation(num_operations=100, rounds=15):
    """Microseconds of CPU time in which Python records one elementwise operation (median over rounds)."""
    accelerator, model, optimizer, (x, _) = prepared(mlp, GROUPS["mlp"][3])
    times = []
    for _ in range(rounds + 3):
        value = model(x)
        start = time.thread_time()
        for _ in range(num_operations):
            value = value + 1.0
        times.append((time.thread_time() - start) / num_operations * 1e6)
        accelerator.backward(value.mean())
        optimizer.zero_grad()
    result = statistics.median(times[3:])
    print(f"\nrecording one operation: {result:.1f} us")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "loop_forms.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"versions": {name: importlib.metadata.version(name) for name in ("torch", "jax", "transformers")}}
    for name in args.only:
        title, make_model, loss_fn, loader, size = GROUPS[name]
        results[name] = report(title, race(contenders(make_model, loss_fn, loader), **size), "train_step(batch)")
    results["per_operation_us"] = per_operation()
    save(args.output, results)


if __name__ == "__main__":
    main()
