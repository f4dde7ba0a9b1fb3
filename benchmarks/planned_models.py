"""What `polyaccel plan` says of whole models on TPU slices: GPT-2 124M and Llama 3 8B, torch modules of transformers without weights.

    python benchmarks/planned_models.py                    # writes benchmarks/results/planned_models.json: one to two hours on two cores
    python benchmarks/planned_models.py --only gpt2        # those cases alone
    python benchmarks/planned_models.py --table            # prints what is there

Needs polyaccel[tpu-plan] (or libtpu on PYTHONPATH) and transformers, and no TPU. A step is forward, backward and AdamW in bfloat16 on
float32 parameters, all of it cut over `fsdp`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "planned_models.json"
GPT2, LLAMA = "gpt2-124m", "llama-3-8b"
# Samples of one device. Llama computes its blocks again in the backward pass.
TOKENS = {GPT2: (4, 1024), LLAMA: (1, 2048)}
CASES = [
    (GPT2, "v5e:2x4"),
    (GPT2, "v5e:16x16"),
    (GPT2, "v5p:4x4x8"),
    (LLAMA, "v5e:2x4"),
    (LLAMA, "v5e:4x4"),
    (LLAMA, "v5e:16x16"),
    (LLAMA, "v5p:4x4x8"),
]
TIMEOUT_S = 3000


def train(name):
    """A script as anybody's; under `polyaccel plan` it ends with its first step."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from polyaccel import Accelerator

    batch_size, length = TOKENS[name]
    accelerator = Accelerator(mixed_precision="bf16", remat="full" if name == LLAMA else "none")
    if name == GPT2:
        config = GPT2Config(n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.zeros(batch_size * 256, length, dtype=torch.int64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = accelerator.train_step(lambda model, x: model(input_ids=x[0], labels=x[0]).loss, model, optimizer)
    for batch in loader:
        step(batch)


def plan(name, topology):
    command = [sys.executable, "-m", "polyaccel.cli.main", "plan", __file__, "--topology", topology, "--json"]
    command += ["--mesh.fsdp", "-1", "--timeout", str(TIMEOUT_S), "--", "--train", name]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: it does not fit
        raise SystemExit(f"{name} on {topology} was not planned")
    found = json.loads(done.stdout)
    batch_size, length = TOKENS[name]
    return {
        "wall_s": round(time.monotonic() - start, 1),
        "load": round(os.getloadavg()[0], 1),
        "tokens_per_device": batch_size * length,
        "compile_s": round(sum(program["compile_s"] for program in found["programs"]), 1),
        "mesh": {axis: size for axis, size in found["mesh"].items() if size > 1},
        **{key: found[key] for key in KEPT},
        "refusal": found["refusal"] and next(line for line in found["refusal"].splitlines() if line.strip()),
    }


KEPT = (
    "num_devices",
    "num_parameters",
    "parameter_bytes",
    "optimizer_bytes",
    "temporary_bytes",
    "peak_bytes",
    "fits",
    "flops",
    "matrix_flops",
    "accessed_bytes",
    "collectives",
    "estimate",
)


def table(rows):
    columns = ["model", "slice", "parameters", "optimizer", "temporaries", "peak", "of the chip", "TFLOP", "of 6ND"]
    columns += ["gathered", "reduced", "sent", "step, not less than", "MFU, at most", "compiled in"]
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    for key, row in rows.items():
        name, topology = key.split()
        if row["refusal"]:
            kept = [f"{row[item] / 1e9:.3g}" for item in ("parameter_bytes", "optimizer_bytes")]
            lines.append(
                f"| {name} | {topology} | {' | '.join(kept)} | does not fit: {row['refusal']}"
                + " |" * 10
                + f" {row['wall_s']:.0f} s |"
            )
            continue
        kinds = {}
        for one in row["collectives"]:
            kinds[one["kind"]] = kinds.get(one["kind"], 0) + one["bytes"]
        sent = sum(one["sent_bytes"] for one in row["collectives"])
        reduced = kinds.get("all-reduce", 0) + kinds.get("reduce-scatter", 0)
        sizes = [row[item] / 1e9 for item in ("parameter_bytes", "optimizer_bytes", "temporary_bytes", "peak_bytes")]
        six = 6 * row["num_parameters"] * row["tokens_per_device"]
        from polyaccel.planned.chips import CHIPS

        chip = CHIPS[topology.partition(":")[0]]
        cells = [f"{size:.3g}" for size in sizes]
        cells += [f"{row['peak_bytes'] / chip.hbm_bytes:.0%}", f"{row['matrix_flops'] / 1e12:.2f}"]
        cells += [f"{row['matrix_flops'] / six:.2f}"]
        cells += [f"{size / 1e9:.2f}" for size in (kinds.get("all-gather", 0), reduced, sent)]
        cells += [
            f"{row['estimate']['seconds'] * 1e3:.1f} ms",
            f"{row['estimate']['mfu']:.0%}",
            f"{row['compile_s']:.0f} s",
        ]
        lines.append(f"| {name} | {topology} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="cases whose name has one of these words"
    )
    parser.add_argument("--train", choices=TOKENS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(options.train)
    if not options.table:
        for name, topology in CASES:
            key = f"{name} {topology}"
            if any(word in key for word in options.only):
                row = plan(name, topology)
                rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                rows[key] = row
                order = [" ".join(case) for case in CASES]
                RESULTS.write_text(
                    json.dumps(dict(sorted(rows.items(), key=lambda item: order.index(item[0]))), indent=2) + "\n"
                )
                print(f"{key}: {row['wall_s']} s", file=sys.stderr, flush=True)
    print(table(json.loads(RESULTS.read_text())))
    return None


if __name__ == "__main__":
    main()
