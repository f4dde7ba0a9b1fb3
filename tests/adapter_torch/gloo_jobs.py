"""Starts a script as the processes of a gloo job on this machine and reads what each of them answered."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def answers_of(script: Path, folder: Path, num_processes: int, *, warnings: str = "ignore") -> list[dict[str, Any]]:
    """Per process the JSON that `script folder` wrote to `<rank>.json` in the folder; `warnings` is what python's -W says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(num_processes)
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", warnings, str(script), str(folder)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        errors = [worker.communicate(timeout=600)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * num_processes, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]
