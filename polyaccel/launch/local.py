"""Starts this machine's processes of a job, and starts the job again as often as the settings allow."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyaccel.config.resolve import Gathered, environment_for, inherited_environment
from polyaccel.config.schema import LaunchSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.rendezvous import Rendezvous, free_port, machines_from_environment, visible_gpus
from polyaccel.launch.supervision import StopRequest, Worker, supervise
from polyaccel.protocols import AgentJob, Backend
from polyaccel.registry import choose_backend

_LONGEST_PAUSE_S = 30.0
_AGENT_S = 15  # an agent's own time to end, after that of its processes
_PORT = 29500
_PLACE = frozenset(Rendezvous(0, 1, 0, 1, "", 0).environment())


def launch(
    command: Sequence[str],
    *,
    gathered: Gathered,
    settings: LaunchSettings,
    dry_run: bool = False,
    ends_process: bool = False,
) -> int:
    """Run `python *command` in every worker slot of the backend, and wait for all.

    Args:
        command: what follows `python`: a script, or "-m" and a module, and its arguments.
        gathered: the settings that the workers get.
        settings: how many of them, and where.
        dry_run: print what would be started, with the variables that each process gets, and start nothing.
        ends_process: this process exits with the result, which no late signal is to change (see `StopRequest`).

    Returns 0, or the exit code of the first worker that failed (128 + signal number if it was killed); the others are stopped.
    After a failure the job is started again up to `max_restarts` times, after 1, 2, 4, ... seconds, unless a signal stopped it.
    """
    if command[0] != "-m" and not Path(command[0]).is_file():
        raise LaunchError(
            f"script {command[0]!r} does not exist", "give the path of a Python file, or -m and a module name"
        )
    settings = _placed(settings)
    chosen = choose_backend(gathered.values.get("backend", "auto"))
    if dry_run:
        print(_described(_workers(command, chosen, gathered, settings, attempt=0)))
        return 0
    with StopRequest(ends_process=ends_process) as stop:
        agent = _agent(command, chosen, gathered, settings)
        if agent is not None:
            return supervise([agent], grace_s=settings.grace_s + _AGENT_S, stop=stop)
        attempt = 0
        while True:
            workers = _workers(command, chosen, gathered, settings, attempt)
            code = supervise(workers, grace_s=settings.grace_s, stop=stop)
            if code == 0 or stop.is_set or attempt == settings.max_restarts:
                return code
            pause_s = min(2.0**attempt, _LONGEST_PAUSE_S)
            attempt += 1
            print(
                f"polyaccel launch: restart {attempt} of {settings.max_restarts} in {pause_s:g} s (exit code {code})",
                file=sys.stderr,
            )
            stop.wait(pause_s)


def _placed(settings: LaunchSettings) -> LaunchSettings:
    """The settings with this machine's place among the job's machines, as flags or else the scheduler tell it."""
    found = machines_from_environment()
    if settings.num_machines == 1 and found is not None and found.num_machines > 1:
        settings = replace(settings, num_machines=found.num_machines)
    if settings.num_machines == 1:
        return settings
    if found is not None and found.num_machines == settings.num_machines:
        settings = replace(
            settings,
            machine_rank=settings.machine_rank or found.machine_rank,
            main_process_ip=settings.main_process_ip or found.address,
            main_process_port=settings.main_process_port or found.port,
        )
    if settings.main_process_ip is None:
        raise LaunchError(
            f"--num-machines {settings.num_machines} without --main-process-ip: the machines cannot find each other",
            "give the address of machine 0 on every machine, and each its own --machine-rank",
        )
    if settings.machine_rank >= settings.num_machines:
        raise LaunchError(
            f"--machine-rank {settings.machine_rank} is outside a job of {settings.num_machines} machines",
            f"ranks count from 0 to {settings.num_machines - 1}",
        )
    if settings.num_processes is not None and settings.num_processes % settings.num_machines:
        raise LaunchError(
            f"--num-processes {settings.num_processes} cannot be spread over {settings.num_machines} machines in equal parts",
            f"use a multiple of {settings.num_machines}: it counts the processes of all machines, as in Accelerate",
        )
    return settings


def _workers(
    command: Sequence[str], backend: Backend, gathered: Gathered, settings: LaunchSettings, attempt: int
) -> list[Worker]:
    machines, rank = settings.num_machines, settings.machine_rank
    here = None if settings.num_processes is None else settings.num_processes // machines
    shared = {**inherited_environment(), **environment_for(gathered, launched=backend.name)}
    if settings.gpu_ids != "all":
        shared["CUDA_VISIBLE_DEVICES"] = settings.gpu_ids
    slots = backend.worker_slots(here, use_cpu=bool(gathered.values.get("cpu")), gpus=visible_gpus(shared))
    size = len(slots) * machines
    address = settings.main_process_ip or "127.0.0.1"
    # A new port for every attempt: the last one's may still be held. On several machines they count attempts alike, since a
    # failure ends the job everywhere.
    port = (settings.main_process_port or _PORT) + attempt if machines > 1 else _local_port(settings, attempt)
    # Python puts a script's own folder first on its path; buffered output of a killed worker would be lost.
    shared.setdefault("PYTHONUNBUFFERED", "1")
    if settings.num_cpu_threads_per_process is not None:
        shared["OMP_NUM_THREADS"] = str(settings.num_cpu_threads_per_process)
    elif len(slots) > 1:
        # Every process would start a thread per core, and they would wait for each other's.
        shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(slots))))
    workers = []
    for index, slot in enumerate(slots):
        place = Rendezvous(rank * len(slots) + index, size, index, len(slots), address, port)
        joined = place.environment() if size > 1 else {}
        environment = {**shared, **joined, **slot.environment}
        workers.append(Worker(str(place.process_index), [sys.executable, *command], environment))
    return workers


def _agent(command: Sequence[str], backend: Backend, gathered: Gathered, settings: LaunchSettings) -> Worker | None:
    """The backend's own agent where machines must agree on a restart, or the job may be restarted; else None."""
    if settings.num_machines == 1 and settings.max_restarts == 0:
        return None  # an agent that imports a framework would only make the start later
    workers = _workers(command, backend, gathered, settings, attempt=0)
    job = AgentJob(
        command=tuple(command),
        num_local_processes=len(workers),
        num_machines=settings.num_machines,
        machine_rank=settings.machine_rank,
        address=settings.main_process_ip or "127.0.0.1",
        port=settings.main_process_port or _PORT,
        max_restarts=settings.max_restarts,
        grace_s=settings.grace_s,
    )
    arguments = backend.agent_arguments(job)
    if arguments is None:
        return None
    environment = {name: v for name, v in (workers[0].environment or {}).items() if name not in _PLACE}
    # Without this, restarts after a killed process hang now and then (torch 2.9 to 2.13): the agent's store is shared with them.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return Worker("agent", [sys.executable, *arguments], environment)


def _local_port(settings: LaunchSettings, attempt: int) -> int:
    if settings.main_process_port is not None:
        return settings.main_process_port + attempt
    return free_port()


def _described(workers: Sequence[Worker]) -> str:
    """The processes as lines for a shell: the variables that differ from this environment, then the command."""
    present = inherited_environment()
    lines = []
    for worker in workers:
        changed = {name: v for name, v in (worker.environment or {}).items() if present.get(name) != v}
        lines.append(
            " ".join(
                [*(f"{name}={shlex.quote(v)}" for name, v in sorted(changed.items())), shlex.join(worker.arguments)]
            )
        )
    return "\n".join(lines)
