"""Trains the examples on every engine that is here and shows that they learn the same: a table, and one picture of all curves.

    scripts/demo                 # makes the environment first
    python examples/demo.py      # in an environment that has torch and jax

Dropout is off, so that every engine computes the same function of the same weights and data, and the curves must lie on each other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).resolve().parent
TASKS = {
    "digits CNN": ["digits_cnn.py", "--epochs", "6", "--dropout", "0"],
    "byte GPT": ["byte_gpt.py", "--updates", "100", "--dropout", "0"],
}
STYLES = {"torch": ("#d62728", 5.0, "-"), "jax": ("#1f77b4", 2.2, "-"), "xla": ("#2ca02c", 1.2, "--")}


def train(python, backend, task, folder):
    """Run one example on one backend in its own process; the curve that it wrote."""
    script, *arguments = TASKS[task]
    curve = folder / f"{script.removesuffix('.py')}_{backend}.json"
    curve.unlink(missing_ok=True)
    print(f"\n{task} on {backend}", flush=True)
    environment = dict(os.environ)
    if backend == "xla":
        environment.setdefault("PJRT_DEVICE", "CPU")
    command = [python, str(EXAMPLES / script), "--backend", backend, "--curve", str(curve), *arguments]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    return json.loads(curve.read_text()) | {"seconds": time.perf_counter() - started}


def difference(losses, reference):
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def table(runs):
    """The runs as text."""
    head = [
        "task",
        "backend",
        "devices",
        "final loss",
        "accuracy",
        "bits/byte",
        "steps/s",
        "compile s",
        "max rel diff to torch",
    ]
    rows = [head]
    for task, by_backend in runs.items():
        for backend, run in by_backend.items():
            reference = by_backend.get("torch")
            rows.append(
                [
                    task,
                    backend,
                    str(run["devices"]),
                    f"{run['losses'][-1]:.4f}",
                    f"{run['accuracy']:.3f}" if "accuracy" in run else "-",
                    f"{run['bits_per_byte']:.3f}" if "bits_per_byte" in run else "-",
                    f"{run['steps_per_s']:.1f}",
                    f"{run['compile_s']:.1f}",
                    "-"
                    if reference is None or backend == "torch"
                    else f"{difference(run['losses'], reference['losses']):.1e}",
                ]
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(runs, path):
    """One picture: for each task the curves of all engines on top of each other, and below their distance to torch."""
    figure, axes = plt.subplots(
        2, len(runs), figsize=(6.5 * len(runs), 6), height_ratios=(3, 1), sharex="col", squeeze=False
    )
    for column, (task, by_backend) in enumerate(runs.items()):
        above, below = axes[:, column]
        for backend, run in by_backend.items():
            color, width, line = STYLES[backend]
            above.plot(run["losses"], color=color, linewidth=width, linestyle=line, label=backend)
            if backend != "torch" and "torch" in by_backend:
                pairs = zip(run["losses"], by_backend["torch"]["losses"], strict=True)
                below.semilogy([max(abs(a - b) / abs(b), 1e-9) for a, b in pairs], color=color, linewidth=1)
        above.set(title=f"{task}: one script, {len(by_backend)} engines", ylabel="training loss")
        above.set_ylim(bottom=0)
        above.legend(frameon=False)
        below.set(xlabel="step", ylabel="relative difference\nto torch", ylim=(1e-9, 1e-1))
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"], choices=["torch", "jax"])
    parser.add_argument(
        "--xla-python", help="the Python of an environment that has torch_xla: the xla engine takes part"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the curves and the picture")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pythons = dict.fromkeys(args.backends, sys.executable)
    if args.xla_python:
        pythons["xla"] = args.xla_python
    runs = {task: {b: train(python, b, task, args.output) for b, python in pythons.items()} for task in TASKS}
    picture = args.output / "curves.png"
    draw(runs, picture)
    print(f"\n{table(runs)}\n\ncurves of all engines on top of each other: {picture}")


if __name__ == "__main__":
    main()
