"""What a run notes about itself when it starts: where it runs, what is installed, which commit. No secrets, no whole environment."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from polyaccel.plan import Plan
from polyaccel.redaction import Redaction
from polyaccel.topology import Topology

PACKAGES = ("polyaccel", "torch", "torch_xla", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "safetensors")
# Variables that change what a run computes or where. All others stay unread.
_TELLING = ("POLYACCEL_", "JAX_", "XLA_", "PJRT_", "NCCL_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_")


def this_process() -> dict[str, Any]:
    """What tells whether the process that writes a run still lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "process_started": process_start(pid)}


def describe(environment: Mapping[str, str], redaction: Redaction) -> dict[str, Any]:
    """Command, machine, versions and commit of this process, with secrets hidden. Takes some hundredths of a second."""
    return {
        "command": redaction.arguments([sys.executable, *sys.argv]),
        "directory": redaction.text(os.getcwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "packages": package_versions(),
        "environment": redaction.tree(
            {name: value for name, value in environment.items() if name.startswith(_TELLING)}
        ),
        "git": _commit(redaction),
    }


def describe_job(backend: str, topology: Topology, plan: Plan) -> dict[str, Any]:
    """The engine, its devices and the plan, as run.json has them."""
    return {
        "backend": backend,
        "device_kind": topology.device_kind,
        "num_devices": topology.num_devices,
        "num_processes": topology.num_processes,
        "num_data_shards": plan.num_data_shards,
        "mesh": dict(plan.mesh.sizes),
        "mixed_precision": plan.precision.name,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
    }


def process_start(pid: int) -> str | None:
    """When a process started, in the kernel's own count; tells it from a later process of the same number. None: not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: int, started: str | None) -> bool:
    """Whether the process that had this number and start time still runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or process_start(pid) in (started, None)


@cache
def package_versions() -> dict[str, str]:
    """The versions of polyaccel and of the frameworks that are installed; looked up once."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit(redaction: Redaction) -> dict[str, Any] | None:
    """The commit of the folder that the script stands in, and whether it was changed since; None outside git."""
    script = Path(sys.argv[0] or ".").resolve()
    folder = script.parent if script.is_file() else Path.cwd()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    return {"commit": commit, "branch": redaction.text(branch or ""), "is_changed": bool(changes)}
