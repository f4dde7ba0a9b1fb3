"""What `polyaccel plan` says of a step's memory, and what jax takes for it: a GPT on four CPU devices of one process.

    python benchmarks/planned_memory.py           # writes benchmarks/results/planned_memory.json
    python benchmarks/planned_memory.py --table   # prints what is there

kept: bytes of parameters and optimizer state on one device, of live arrays. temporaries: how far the resident memory of the process rises
above that while a step runs whose program is compiled already, over the number of devices. Linux: it reads /proc/self.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "planned_memory.json"
NUM_DEVICES = 4
MESHES = {"data=4": {"data": 4}, "fsdp=4": {"fsdp": 4}, "data=2 fsdp=2": {"data": 2, "fsdp": 2}}
WARM_UP = 2  # steps before the one that is measured


def train():
    """A script as anybody's; under `polyaccel plan` it ends with its first step."""
    import torch
    from torch import nn

    from polyaccel import Accelerator

    width, vocab, length = 256, 8192, 256

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(width, vocab, bias=False)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.places.weight
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
            return self.head(self.layers(x, mask=mask, is_causal=True))

    def loss_fn(model, batch):
        (tokens,) = batch
        return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    accelerator = Accelerator(backend="jax")
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, vocab, (256, length), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = accelerator.train_step(loss_fn, model, optimizer)
    for index, batch in enumerate(loader):
        if index < WARM_UP:
            step(batch).item()
        else:
            print(json.dumps(measured(lambda batch=batch: step(batch).item())))
            return


def measured(step):
    """Bytes of one device: of live arrays, and what a step takes beside them."""
    import jax

    gc.collect()
    first = jax.local_devices()[0]
    kept = sum(
        shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards if shard.device == first
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = memory("VmRSS")
    step()
    return {"kept": kept, "temporaries": (memory("VmHWM") - before) // NUM_DEVICES}


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def compare(mesh):
    """One row: the plan's bytes and those that were taken."""
    flags = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    plan = [sys.executable, "-m", "polyaccel.cli.main", "plan", __file__, "--topology", f"cpu:{NUM_DEVICES}", "--json"]
    planned = json.loads(run([*plan, *flags, "--", "--train"]))
    variables = {f"POLYACCEL_MESH__{axis.upper()}": str(size) for axis, size in mesh.items()}
    # Freed memory goes back at once, so that the step takes again what it needs.
    variables |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES)}
    taken = json.loads(run([sys.executable, __file__, "--train"], variables).splitlines()[-1])
    return {
        "planned": {
            "kept": planned["parameter_bytes"] + planned["optimizer_bytes"] + planned["buffer_bytes"],
            "temporaries": planned["temporary_bytes"],
        },
        "taken": taken,
    }


def run(command, variables=None):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env={**os.environ, **(variables or {})}, cwd=folder, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def table(rows):
    lines = [
        "| mesh | kept: planned | taken | temporaries: planned | taken | taken / planned |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        one, two = row["planned"], row["taken"]
        cells = [f"{value / 1e6:.2f}" for value in (one["kept"], two["kept"], one["temporaries"], two["temporaries"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {two['temporaries'] / one['temporaries']:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, help="these alone (default: all)")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train()
    if not options.table:
        rows = {}
        for name in options.meshes or MESHES:
            rows[name] = compare(MESHES[name])
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(json.loads(RESULTS.read_text())))
    return None


if __name__ == "__main__":
    main()
