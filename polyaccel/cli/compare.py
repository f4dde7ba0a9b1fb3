"""`polyaccel compare`: runs one script on several engines and says where their numbers part and what each one costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyaccel.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from polyaccel.tracking.comparison import Comparison, Recording

_LINES_OF_OUTPUT = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel compare`."""
    parser.add_argument(
        "--backends", required=True, metavar="A,B", help="engines, such as torch,jax; the first is the reference"
    )
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="updates of each run (default: 50; 0: the whole script)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of each run, until the script calls set_seed (default: 0)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="relative, of losses and gradient norms (default: 0.001)",
    )
    parser.add_argument(
        "--parameter-tolerance",
        type=float,
        default=0.01,
        metavar="X",
        help="||a - b|| / ||a|| over all parameters at the end (default: 0.01)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write a page, too")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="new folder that keeps the recordings (default: deleted)"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where an accelerator is present")
    parser.add_argument("--num-processes", metavar="N", help="processes of each run, as for launch")
    parser.add_argument("script", help="the training script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="its arguments, after --")


def run(options: argparse.Namespace) -> int:
    """Run, compare and report; 0 where every engine agrees with the first one, else 3."""
    backends = [name.strip() for name in options.backends.split(",") if name.strip()]
    if len(backends) < 2 or len(set(backends)) < len(backends):
        raise ConfigError(f"--backends {options.backends} names no two engines", "write --backends torch,jax")
    if options.steps < 0:
        raise ConfigError(f"--steps {options.steps} is below 0", "give a number of updates, or 0 for the whole script")
    if not Path(options.script).is_file():
        raise LaunchError(f"script {options.script!r} does not exist", "give the path of a Python file")
    if options.keep is not None:
        return _compare(options, backends, options.keep)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="polyaccel-compare-") as folder:
        return _compare(options, backends, Path(folder))


def _compare(options: argparse.Namespace, backends: Sequence[str], folder: Path) -> int:
    from polyaccel.tracking.comparison import compare

    recordings = [_record(options, backend, folder / backend) for backend in backends]
    comparisons = [
        compare(recordings[0], other, tolerance=options.tolerance, parameter_tolerance=options.parameter_tolerance)
        for other in recordings[1:]
    ]
    _print(recordings, comparisons)
    if options.output is not None:
        _write(options, recordings, comparisons)
    print()
    for comparison in comparisons:
        print(comparison.verdict)
    return 3 if any(comparison.objections for comparison in comparisons) else 0


def _record(options: argparse.Namespace, backend: str, folder: Path) -> Recording:
    import subprocess

    from polyaccel.tracking.comparison import Recording

    command = [sys.executable, "-m", "polyaccel.cli.main", "launch", "--backend", backend, "--seed", str(options.seed)]
    command += ["--record", str(folder.absolute()), "--record-steps", str(options.steps)]
    command += ["--cpu"] if options.cpu else []
    command += ["--num-processes", options.num_processes] if options.num_processes is not None else []
    arguments = options.script_args[1:] if options.script_args[:1] == ["--"] else options.script_args
    print(f"running {options.script} on {backend} ...", file=sys.stderr, flush=True)
    done = subprocess.run([*command, options.script, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-_LINES_OF_OUTPUT:])
        raise LaunchError(
            f"{options.script} failed on {backend} with exit code {done.returncode}:\n{last}",
            f"run it alone: polyaccel launch --backend {backend} {options.script}",
        )
    recording = Recording(backend, folder)
    if not list(folder.glob("facts-*.json")):
        raise LaunchError(
            f"{options.script} recorded nothing on {backend}",
            "it must create a polyaccel.Accelerator and train with it",
        )
    made = recording.facts["backend"]
    if made != backend:
        raise LaunchError(
            f"{options.script} ran on {made}, not on {backend}: it names its backend itself",
            "leave backend= out of Accelerator(...)",
        )
    return recording


def _print(recordings: Sequence[Recording], comparisons: Sequence[Comparison]) -> None:
    from polyaccel.tracking.charts import braille
    from polyaccel.tracking.comparison import rows

    if any(recording.losses for recording in recordings):
        print("loss")
        print(braille({one.name: _curve(one.losses) for one in recordings}, height=12))
        print()
    lines = [["", *(recording.name for recording in recordings)], *rows(recordings, comparisons)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _write(options: argparse.Namespace, recordings: Sequence[Recording], comparisons: Sequence[Comparison]) -> None:
    from polyaccel.config.resolve import inherited_environment
    from polyaccel.redaction import Redaction
    from polyaccel.tracking.charts import svg
    from polyaccel.tracking.comparison import rows
    from polyaccel.tracking.report import page, table, write_page

    charts = svg({one.name: _curve(one.losses) for one in recordings}, "loss")
    if any(one.grad_norms for one in recordings):
        charts += svg({one.name: _curve(one.grad_norms) for one in recordings}, "gradient norm")
    reference = recordings[0]
    apart = {one.name: _apart(reference.losses, one.losses) for one in recordings[1:]}
    charts += svg(apart, f"relative difference of the loss from {reference.name}", log_scale=True)
    sections = {
        "Is it safe to switch?": table([[comparison.verdict] for comparison in comparisons]),
        "Curves": f'<div class="charts">{charts}</div>',
        "Engines": table(rows(recordings, comparisons), ["", *(one.name for one in recordings)]),
    }
    arguments = Redaction(inherited_environment()).arguments([options.script, *options.script_args])
    lead = (
        f"{' '.join(arguments)}: {options.steps or 'all'} steps, seed {options.seed},"
        f" relative tolerance {options.tolerance:g}, of parameters {options.parameter_tolerance:g}"
    )
    title = f"{Path(options.script).name} on {', '.join(one.name for one in recordings)}"
    print(f"\nwrote {write_page(options.output, page(title, lead, sections))}")


def _curve(numbers: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """One value for each step: of several micro batches the mean."""
    by_step: dict[int, list[float]] = {}
    for step, value in numbers:
        by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in by_step.items()]


def _apart(first: Sequence[tuple[int, float]], second: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    pairs = zip(_curve(first), _curve(second), strict=False)
    return [(step, abs(a - b) / (max(abs(a), abs(b)) or 1.0)) for (step, a), (_, b) in pairs]
