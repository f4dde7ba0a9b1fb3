"""`polyaccel launch`: turns flags into the settings of workers and starts them."""

from __future__ import annotations

import argparse
from typing import Any

from polyaccel.precision import MIXED_PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel launch`."""
    parser.add_argument("--backend", help="torch, xla, jax or an installed third-party backend (default: auto)")
    parser.add_argument(
        "--num-processes",
        "--num_processes",
        type=int,
        help="processes on this machine (default: what the backend wants: torch one per GPU, xla and jax one per host)",
    )
    parser.add_argument("--mixed-precision", "--mixed_precision", choices=MIXED_PRECISIONS)
    parser.add_argument("--gradient-accumulation-steps", "--gradient_accumulation_steps", type=int)
    parser.add_argument("--split-batches", "--split_batches", action="store_true", default=None)
    parser.add_argument("--partitioning", choices=("auto", "pmap", "sharding"))
    parser.add_argument(
        "--cpu", action="store_true", default=None, help="use the CPU even where an accelerator is present"
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module name, as in python -m")
    parser.add_argument("script", help="the training script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def run(options: argparse.Namespace) -> int:
    """Start the workers and wait; returns the first failing worker's exit code, else 0."""
    from polyaccel.launch.local import launch

    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("mixed_precision", "gradient_accumulation_steps", "split_batches", "partitioning", "cpu")
    }
    command = ["-m", options.script] if options.module else [options.script]
    return launch(
        [*command, *options.script_args],
        backend=options.backend,
        num_processes=options.num_processes,
        settings=settings,
    )
