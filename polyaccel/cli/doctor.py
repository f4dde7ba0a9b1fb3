"""`polyaccel doctor`: tries every engine on this machine, within a deadline, and says what is wrong and what cures it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.cli.findings import Finding

STAGES = {"open": "join the job", "devices": "find devices", "step": "train a step", "collective": "sum over processes"}

_TPU_ENGINES = "jax with libtpu, torch with torch_tpu, xla with torch_xla[tpu]; each wants its own libtpu, and so its own environment"


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
    from polyaccel.cli.findings import show
    from polyaccel.errors import PolyaccelError
    from polyaccel.registry import automatic_choice, backend_names, load_backend
    from polyaccel.tpus import num_local_chips

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
            show(finding)
            healthy = healthy and finding.is_good
    num_chips = num_local_chips()
    if num_chips:
        print(f"this machine has {num_chips} TPU chip{'' if num_chips == 1 else 's'}: {_TPU_ENGINES}")
    try:
        backend, why = automatic_choice()
        print(f'backend "auto": {backend.name} ({why})')
    except PolyaccelError as error:
        print(f'backend "auto": none ({error.message})')
    return 0 if healthy else 1


def check(backend: str, deadline_s: float, *, cpu: bool = False, num_processes: int | None = None) -> Iterator[Finding]:
    """The findings of one engine, as processes of their own tell them."""
    from polyaccel.cli.findings import launched

    flags = ["--backend", backend, *(["--cpu"] if cpu else []), "--grace-s", "5"]
    flags += ["--num-processes", str(num_processes)] if num_processes else []
    cure = "look for a firewall between the processes, a device that another program holds, or give --deadline-s more"
    yield from launched("polyaccel.testing.health", flags, STAGES, deadline_s, cure=cure)
