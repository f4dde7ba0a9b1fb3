"""`polyaccel test`: trains through the configuration in force on each engine, and says whether the numbers are right."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.cli.findings import Finding
    from polyaccel.config.resolve import Gathered

STAGES = {
    "open": "join the job",
    "value": "train with backward(loss)",
    "function": "train with backward(loss_fn, model, batch)",
    "train_step": "train with train_step",
    "gather": "gather every sample once",
}
_RIGHT, _WRONG = "the numbers are right", "NOT shown to compute the right numbers: see !! above"
_DEADLINE = (
    "look for a firewall between the processes or a device that another program holds, or give --deadline-s more"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `test`."""
    parser.add_argument(
        "--backend", metavar="A,B", help="engines (default: the configured one, else all that are installed)"
    )
    parser.add_argument(
        "--config-file", "--config_file", type=Path, help="as for launch (default: the file that is in force here)"
    )
    parser.add_argument(
        "--dialect", metavar="torch|flax", help="language of the script that is tried (default: each engine's own)"
    )
    parser.add_argument("--num-processes", "--num_processes", metavar="N", help="as for launch")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where an accelerator is present")
    parser.add_argument(
        "--conformance",
        nargs="?",
        const="cpu",
        choices=("cpu", "device"),
        help="run every engine's conformance suite, too, by pytest: on the CPU, or on the device that is here",
    )
    parser.add_argument(
        "--deadline-s", type=float, default=300.0, metavar="S", help="time of one engine (default: 300)"
    )


def run(options: argparse.Namespace) -> int:
    """Test every engine; returns 0 where each gives the right numbers."""
    from importlib.util import find_spec

    from polyaccel.cli.findings import show
    from polyaccel.config.resolve import config_file, config_of, gather
    from polyaccel.errors import LaunchError
    from polyaccel.registry import load_backend

    if options.conformance and find_spec("pytest") is None:
        raise LaunchError("--conformance needs pytest, which is not installed here", "pip install pytest")
    path = options.config_file or config_file()
    flags = {"launch.num_processes": options.num_processes, "cpu": "true" if options.cpu else None}
    gathered = gather(file=path, flags={name: text for name, text in flags.items() if text is not None})
    config_of(gathered)  # every mistake of the file is shown before a process starts
    print(f"configuration: {path or 'no file'}")
    for name, value in gathered.values.items():
        print(f"  {name}={value} ({gathered.sources[name]})")
    asked, names = _engines(options.backend, gathered)
    results = {}
    for name in names:
        probe = load_backend(name).probe()
        print(f"{name}{f' {probe.version}' if probe.version else ''}", flush=True)
        if not probe.is_usable:
            print(f"  -  not usable here: {probe.reason}\n     cure: {probe.cure}")
            if asked:
                results[name] = "not usable here"
            continue
        results[name] = _RIGHT
        for finding in _findings(name, options, path, gathered):
            show(finding)
            results[name] = results[name] if finding.is_good else _WRONG
    print()
    for name, verdict in results.items():
        print(f"{name}: {verdict}")
    if not results:
        raise LaunchError("no engine is installed here", "pip install 'polyaccel[torch]' or 'polyaccel[jax]'")
    return 0 if set(results.values()) == {_RIGHT} else 1


def _engines(flag: str | None, gathered: Gathered) -> tuple[bool, list[str]]:
    """Whether somebody has named them, and their names."""
    from polyaccel.registry import backend_names

    if flag is not None:
        return True, [name.strip() for name in flag.split(",") if name.strip()]
    configured = gathered.values.get("backend", "auto")
    return (True, [configured]) if configured != "auto" else (False, backend_names())


def _findings(backend: str, options: argparse.Namespace, path: Path | None, gathered: Gathered) -> Iterator[Finding]:
    from polyaccel.cli.findings import launched

    flags = ["--config-file", str(path)] if path is not None else []
    # A failure is a finding, and nothing to start again for.
    flags += ["--backend", backend, "--on", "local", "--max-restarts", "0", "--grace-s", "5"]
    flags += ["--cpu"] if options.cpu else []
    machines, count = gathered.values.get("launch.num_machines", 1), gathered.values.get("launch.num_processes")
    if machines > 1:
        print(f"  (launch.num_machines={machines}: this machine's part is tried alone)")
        flags += ["--num-machines", "1", "--machine-rank", "0", "--main-process-ip", "127.0.0.1"]
        count = None if count is None else count // machines
    flags += ["--num-processes", str(count)] if count is not None else []
    dialect = [] if options.dialect is None else [options.dialect]
    module = "polyaccel.testing.trial"
    yield from launched(module, flags, STAGES, options.deadline_s, cure=_DEADLINE, arguments=dialect)
    if options.conformance:
        where = "cpu" if options.cpu else options.conformance
        yield from _conformance(backend, dialect, options.deadline_s, where)


def _conformance(backend: str, dialect: list[str], deadline_s: float, where: str) -> Iterator[Finding]:
    """The suite asks for settings itself: none of this configuration reaches it."""
    import sys

    from polyaccel.cli.findings import reported
    from polyaccel.config.resolve import environment_without_settings
    from polyaccel.registry import load_backend

    environment = environment_without_settings()
    environment |= load_backend(backend).worker_slots(1, use_cpu=where == "cpu")[0].environment
    command = [
        sys.executable,
        "-m",
        "polyaccel.testing.suite",
        *(["--device"] if where == "device" else []),
        backend,
        *dialect,
    ]
    stages = {"conformance": "run the conformance suite"}
    yield from reported(
        command, stages, deadline_s, cure="give --deadline-s more", by_hand=command, environment=environment
    )
