"""Starts this machine's processes of a job, and starts a job of one machine again as often as the settings allow."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from polyaccel.config.resolve import Gathered, environment_for, inherited_environment
from polyaccel.config.schema import PREEMPTED, LaunchSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.leading import pause_before
from polyaccel.launch.rendezvous import Rendezvous, free_port, machines_from_environment, visible_gpus
from polyaccel.launch.supervision import StopRequest, Worker, supervise
from polyaccel.protocols import Backend, WorkerSlot
from polyaccel.registry import choose_backend

_PORT = 29500


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
    After a failure the job is started again up to `max_restarts` times, after 1, 2, 4, ... seconds, unless a signal stopped it or its
    processes have saved to be continued later. With several machines each runs this; they stop and start together (`several`).
    """
    if command[0] != "-m" and not Path(command[0]).is_file():
        raise LaunchError(
            f"script {command[0]!r} does not exist", "give the path of a Python file, or -m and a module name"
        )
    settings = _placed(settings)
    _require_global_batch(settings, gathered)
    chosen = choose_backend(gathered.values.get("backend", "auto"))
    shared, slots = _shared(chosen, gathered, settings)

    def workers_at(place: Rendezvous, interface: str | None = None) -> list[Worker]:
        found = {} if interface is None or "GLOO_SOCKET_IFNAME" in shared else {"GLOO_SOCKET_IFNAME": interface}
        return _workers(command, {**found, **shared}, slots, place)

    port = settings.main_process_port
    if dry_run:
        print(_described(workers_at(_dry_place(settings, len(slots)))))
        return 0
    with StopRequest(ends_process=ends_process) as stop:
        if settings.num_machines > 1:
            from polyaccel.launch import several

            return several.run(
                workers_at, len(slots), backend=chosen.name, port=port or _PORT, settings=settings, stop=stop
            )
        attempt = 0
        while True:
            # A new port for every attempt: the last one's may still be held.
            place = Rendezvous(
                0, len(slots), 0, len(slots), "127.0.0.1", free_port() if port is None else port + attempt
            )
            code = supervise(workers_at(place), grace_s=settings.grace_s, stop=stop)
            if code in (0, PREEMPTED) or stop.is_set or attempt == settings.max_restarts:
                return code
            attempt += 1
            pause_s = pause_before(attempt)
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


def _require_global_batch(settings: LaunchSettings, gathered: Gathered) -> None:
    """Raises LaunchError for a job that may go on with fewer machines, and would then train with another global batch."""
    fewest = settings.min_machines
    if fewest is None or fewest == settings.num_machines:
        return
    if fewest > settings.num_machines:
        raise LaunchError(
            f"--min-machines {fewest} is more than --num-machines {settings.num_machines}",
            "leave it out, or name the fewest machines that the job may go on with",
        )
    if "micro_batches_per_update" not in gathered.values and not gathered.values.get("split_batches"):
        raise LaunchError(
            f"--min-machines {fewest} of {settings.num_machines} without --micro-batches-per-update: with fewer machines the global"
            " batch would be smaller",
            "say how many batches of the loader all data shards together take per update: gradient_accumulation_steps x data shards"
            " of all machines",
        )


def _shared(
    backend: Backend, gathered: Gathered, settings: LaunchSettings
) -> tuple[dict[str, str], tuple[WorkerSlot, ...]]:
    """The environment that all processes of this machine have in common, and one slot for each."""
    here = None if settings.num_processes is None else settings.num_processes // settings.num_machines
    shared = {**inherited_environment(), **environment_for(gathered, launched=backend.name)}
    if settings.gpu_ids != "all":
        shared["CUDA_VISIBLE_DEVICES"] = settings.gpu_ids
    slots = backend.worker_slots(here, use_cpu=bool(gathered.values.get("cpu")), gpus=visible_gpus(shared))
    # Python puts a script's own folder first on its path; buffered output of a killed worker would be lost.
    shared.setdefault("PYTHONUNBUFFERED", "1")
    if settings.num_cpu_threads_per_process is not None:
        shared["OMP_NUM_THREADS"] = str(settings.num_cpu_threads_per_process)
    elif len(slots) > 1:
        # Every process would start a thread per core, and they would wait for each other's.
        shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(slots))))
    return shared, slots


def _workers(
    command: Sequence[str], shared: Mapping[str, str], slots: Sequence[WorkerSlot], first: Rendezvous
) -> list[Worker]:
    """One worker per slot; `first` is the place of the first one."""
    workers = []
    for index, slot in enumerate(slots):
        place = replace(first, process_index=first.process_index + index, local_process_index=index)
        joined = place.environment() if place.num_processes > 1 else {}
        environment = {**shared, **joined, **slot.environment}
        workers.append(Worker(str(place.process_index), [sys.executable, *command], environment))
    return workers


def _dry_place(settings: LaunchSettings, num_local: int) -> Rendezvous:
    """The place of this machine's first process in the first attempt, if all machines have as many."""
    machines, port = settings.num_machines, settings.main_process_port
    port = (port or _PORT) + 1 if machines > 1 else port or free_port()
    address = settings.main_process_ip or "127.0.0.1"
    return Rendezvous(settings.machine_rank * num_local, machines * num_local, 0, num_local, address, port)


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
