"""How tests start a job."""

import sys

LAUNCH = (sys.executable, "-m", "polyaccel.cli.main", "launch")


def launch_command(backend, processes, *arguments):
    """`polyaccel launch` with this many processes of an engine, on the CPU."""
    devices = () if backend == "xla" else ("--cpu",)  # xla's CPU is chosen by PJRT_DEVICE
    return [*LAUNCH, "--backend", backend, *devices, "--num-processes", str(processes), *map(str, arguments)]
