"""How tests start a job."""

import os
import sys
from pathlib import Path

LAUNCH = (sys.executable, "-m", "polyaccel.cli.main", "launch")


def launch_command(backend, processes, *arguments):
    """`polyaccel launch` with this many processes of an engine, on the CPU."""
    devices = () if backend == "xla" else ("--cpu",)  # xla's CPU is chosen by PJRT_DEVICE
    return [*LAUNCH, "--backend", backend, *devices, "--num-processes", str(processes), *map(str, arguments)]


def has_ended(pid):
    """Also of a process that is dead and has not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def with_devices(number):
    """What the environment of a process needs beside this one's to show it so many virtual devices of jax."""
    chosen = os.environ.get("XLA_FLAGS", "")  # as conftest.py has it, how to compile included; the last number counts
    return {"XLA_FLAGS": f"{chosen} --xla_force_host_platform_device_count={number}"}
