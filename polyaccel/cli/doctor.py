"""`polyaccel doctor`: tries every engine on this machine, within a deadline, and says what is wrong and what cures it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAGES = {"open": "join the job", "devices": "find devices", "step": "train a step", "collective": "sum over processes"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a stage of an engine's check said. `cure` is empty where all is well."""

    stage: str
    is_good: bool
    words: str
    cure: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    parser.add_argument("--backend", action="append", help="only this one (may be given several times)")
    parser.add_argument(
        "--deadline-s", type=float, default=120.0, metavar="S", help="time of one engine (default: 120)"
    )
    parser.add_argument("--cpu", action="store_true", help="try the CPU even where an accelerator is present")
    parser.add_argument("--num-processes", "--num_processes", type=int, metavar="N", help="as in `polyaccel launch`")


def run(options: argparse.Namespace) -> int:
    """Check every engine; returns 0 if each one that is installed is healthy."""
    from polyaccel.registry import backend_names, load_backend

    names = options.backend or backend_names()
    healthy = True
    for name in names:
        probe = load_backend(name).probe()
        print(f"{name}{f' {probe.version}' if probe.version else ''}")
        if not probe.is_usable:
            print(f"  -  not usable here: {probe.reason}\n     cure: {probe.cure}")
            healthy = healthy and not options.backend  # an engine that nobody asked for need not be installed
            continue
        for finding in check(name, options.deadline_s, cpu=options.cpu, num_processes=options.num_processes):
            print(f"  {'ok' if finding.is_good else '!!'} {finding.stage:12} {finding.words}", flush=True)
            if finding.cure:
                print(f"     cure: {finding.cure}")
            healthy = healthy and finding.is_good
    return 0 if healthy else 1


def check(backend: str, deadline_s: float, *, cpu: bool = False, num_processes: int | None = None) -> Iterator[Finding]:
    """The findings of one engine, as processes of their own tell them: a framework that hangs or crashes takes nobody with it."""
    flags = ["--backend", backend, *(["--cpu"] if cpu else []), "--grace-s", "5"]
    flags += ["--num-processes", str(num_processes)] if num_processes else []
    with tempfile.TemporaryDirectory(prefix="polyaccel-doctor-") as folder:
        report = Path(folder) / "report"
        command = [
            sys.executable,
            "-m",
            "polyaccel.cli.main",
            "launch",
            *flags,
            "-m",
            "polyaccel.testing.health",
            str(report),
        ]
        timed_out = False
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                output, _ = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                timed_out = True
                process.terminate()
                output, _ = process.communicate()
        findings = [Finding(**json.loads(line)) for line in report.read_text().splitlines()] if report.exists() else []
    yield from findings
    if all(finding.is_good for finding in findings) and len(findings) == len(STAGES) and process.returncode == 0:
        return
    if findings and not findings[-1].is_good:
        return
    reached = list(STAGES)[min(len(findings), len(STAGES) - 1)]
    if timed_out:
        yield Finding(
            reached,
            False,
            f"did not {STAGES[reached]} within {deadline_s:g} s",
            "look for a firewall between the processes, a device that another program holds, or give --deadline-s more",
        )
    else:
        lines = [line for line in output.splitlines() if line.strip()]
        words = lines[-1] if lines else "no message"
        yield Finding(reached, False, f"could not {STAGES[reached]} (exit code {process.returncode}): {words}", "run the same with: "
                      f"polyaccel launch {' '.join(flags)} -m polyaccel.testing.health report.jsonl")  # fmt: skip
