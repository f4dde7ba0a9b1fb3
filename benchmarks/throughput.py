"""Tokens per second of a GPT on this machine's device: polyaccel on torch and on jax beside hand-written loops, interleaved.

python benchmarks/throughput.py --precision bf16 --width 768 --layers 12 --batch 16
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from interleaved import Contender, race, report, save

from polyaccel import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from byte_gpt import CONTEXT, GPT, next_byte_loss


def make_model(args):
    torch.manual_seed(0)
    return GPT(layers=args.layers, heads=args.width // 64 or 1, width=args.width)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def by_hand(args, window):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(args).to(device)
    optimizer, window = adamw(model), window.to(device)
    if args.compile:
        model = torch.compile(model)
    dtype = {"no": None, "bf16": torch.bfloat16}[args.precision]

    def step():
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = next_byte_loss(model, window)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender("hand-written torch", step, torch.cuda.synchronize if device == "cuda" else lambda: None)


def through_polyaccel(args, window, backend):
    options = {"compile": True} if args.compile and backend == "torch" else {}
    accelerator = Accelerator(backend=backend, mixed_precision=args.precision, **options)
    model = make_model(args)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    step = accelerator.train_step(next_byte_loss, model, optimizer)
    window = window.to(accelerator.device)
    return Contender(f"polyaccel train_step on {backend}", lambda: step(window), accelerator._engine.synchronize)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile both torch contenders")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "throughput.json"))
    args = parser.parse_args()
    window = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (args.batch, CONTEXT + 1)))
    contenders = [by_hand(args, window), *(through_polyaccel(args, window, backend) for backend in ("torch", "jax"))]
    rows = report(
        f"GPT {args.layers} x {args.width}, {args.batch} x {CONTEXT} tokens, {args.precision}",
        race(contenders, rounds=args.rounds, steps=args.steps),
        "hand-written torch",
    )
    tokens = args.batch * CONTEXT
    for name, row in rows.items():
        row["tokens_per_s"] = tokens / row["wall_us"] * 1e6
        print(f"{name}: {row['tokens_per_s']:,.0f} tokens/s")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "jax")}
    save(args.output, {"device": device, "jax_device": str(jax.devices()[0]), "versions": versions, "gpt": rows})


if __name__ == "__main__":
    main()
