"""What the layer costs per step of a whole training loop: loader, accumulation, backward, clipping, optimizer, scheduler; and of an
evaluation loop with `gather_for_metrics`.

    python benchmarks/full_loop.py                # a table per loop, JSON in benchmarks/results/

An MLP of 16-32-1 in batches of 8 with SGD, where a step is nothing but overhead, on torch: by hand, with polyaccel, and with Hugging
Face Accelerate, step by step in turn in one process.
"""

import argparse
import importlib.metadata
from pathlib import Path

import accelerate
import torch
import torch.nn.functional as F
from interleaved import Contender, race, report, save
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator

GENERATOR = torch.Generator().manual_seed(0)
ROWS = TensorDataset(torch.randn(2048, 16, generator=GENERATOR), torch.randn(2048, 1, generator=GENERATOR))
ACCUMULATION = 2


def parts():
    """Model, optimizer, loader and scheduler as a script has them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return (
        model,
        optimizer,
        DataLoader(ROWS, batch_size=8),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step),
    )


def train_by_hand():
    model, optimizer, loader, scheduler = parts()
    while True:
        for number, (x, y) in enumerate(loader, 1):
            loss = F.mse_loss(model(x), y)
            (loss / ACCUMULATION).backward()
            if number % ACCUMULATION == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            yield


def train_with(accelerator):
    model, optimizer, loader, scheduler = accelerator.prepare(*parts())
    while True:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            yield


def evaluate_by_hand():
    model, _, loader, _ = parts()
    while True:
        for x, y in loader:
            with torch.no_grad():
                held = model(x), y
            yield held


def evaluate_with(accelerator):
    model, _, loader, _ = accelerator.prepare(*parts())
    while True:
        for x, y in loader:
            with torch.no_grad():
                held = accelerator.gather_for_metrics((model(x), y))
            yield held


def contenders(by_hand, layered, **settings):
    steps = {
        "by hand": by_hand(),
        "polyaccel": layered(Accelerator(backend="torch", cpu=True, **settings)),
        "accelerate": layered(accelerate.Accelerator(cpu=True, **settings)),
    }
    return [Contender(name, lambda loop=loop: next(loop), lambda: None) for name, loop in steps.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "full_loop.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"versions": {name: importlib.metadata.version(name) for name in ("torch", "accelerate")}}
    for title, racers in (
        ("training loop", contenders(train_by_hand, train_with, gradient_accumulation_steps=ACCUMULATION)),
        ("evaluation loop", contenders(evaluate_by_hand, evaluate_with)),
    ):
        # Blocks of whole passes: every block has the same number of starts of the loader.
        raced = race(racers, rounds=args.rounds, steps=len(ROWS) // 8, warm_up=len(ROWS) // 8)
        results[title] = report(title, raced, "by hand")
    save(args.output, results)


if __name__ == "__main__":
    main()
