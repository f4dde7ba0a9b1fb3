"""Starts the processes of a job on this machine, watches them, and stops all when one fails."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from polyaccel.config.resolve import Gathered, environment_for, inherited_environment
from polyaccel.config.schema import LaunchSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel.registry import choose_backend

GRACE_S = 15.0  # between SIGTERM and SIGKILL; jax.distributed ignores SIGTERM
_POLL_S = 0.05


def launch(command: Sequence[str], *, gathered: Gathered, settings: LaunchSettings) -> int:
    """Run `python *command` in every worker slot of the backend, and wait for all.

    Args:
        command: what follows `python`: a script, or "-m" and a module, and its arguments.
        gathered: the settings that the workers get.
        settings: how many of them, and where.

    Returns 0, or the exit code of the first worker that failed (128 + signal number if it was killed); the others are stopped.
    """
    if command[0] != "-m" and not Path(command[0]).is_file():
        raise LaunchError(
            f"script {command[0]!r} does not exist", "give the path of a Python file, or -m and a module name"
        )
    chosen = choose_backend(gathered.values.get("backend", "auto"))
    slots = chosen.worker_slots(settings.num_processes, use_cpu=bool(gathered.values.get("cpu")))
    environment = {**inherited_environment(), **environment_for(gathered, launched=chosen.name)}
    # Python puts a script's own folder first on its path; buffered output of a killed worker would be lost.
    environment.setdefault("PYTHONUNBUFFERED", "1")
    address, port = "127.0.0.1", _free_port()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with _Signals(workers):
            for index, slot in enumerate(slots):
                place = Rendezvous(index, len(slots), index, len(slots), address, port)
                joined = place.environment() if len(slots) > 1 else {}
                worker_environment = {**environment, **joined, **slot.environment}
                workers.append(subprocess.Popen([sys.executable, *command], env=worker_environment))
            return _wait(workers)
    finally:
        _stop(workers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    running = dict(enumerate(workers))
    while running:
        for index, worker in list(running.items()):
            code = worker.poll()
            if code is None:
                continue
            del running[index]
            if code != 0:
                code = 128 - code if code < 0 else code
                if len(workers) > 1:
                    stopped = f"; stopping the other {len(running)}" if running else ""
                    print(
                        f"polyaccel launch: process {index} of {len(workers)} failed with exit code {code}{stopped}",
                        file=sys.stderr,
                    )
                return code
        time.sleep(_POLL_S)
    return 0


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


class _Signals:
    """While workers run, SIGTERM and SIGINT go to them, and their exit codes decide."""

    def __init__(self, workers: list[subprocess.Popen[bytes]]) -> None:
        self._workers = workers
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def forward(number: int, frame: FrameType | None) -> None:
            for worker in self._workers:
                if worker.poll() is None:
                    worker.send_signal(number)

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, forward)
        except ValueError:
            pass  # not the main thread: signals are the caller's business

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
