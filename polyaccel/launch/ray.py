"""A job on a Ray cluster: one actor per machine, which runs `polyaccel launch` there with its machine's rank."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

from polyaccel.config.schema import RaySettings
from polyaccel.errors import LaunchError
from polyaccel.launch.cluster import Job


class _Machine:
    """What runs on a machine of the cluster. Ray makes an actor of it."""

    def address(self) -> tuple[str, int]:
        """This machine's address in the cluster, and a port that is free on it now."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, command: list[str]) -> int:
        """Run a command; its output goes to Ray's log of this actor, which Ray shows to who started the job."""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


def resources(settings: RaySettings) -> dict[str, Any]:
    """What every actor asks of its machine, as options of a Ray actor."""
    options: dict[str, Any] = {"num_cpus": settings.cpus_per_machine, "num_gpus": settings.gpus_per_machine}
    if settings.tpus_per_machine:
        options["resources"] = {"TPU": settings.tpus_per_machine}
    return options


def run(job: Job, settings: RaySettings) -> int:
    """Run the job on the cluster and wait; returns the exit code of the first machine that failed, or 0.

    Raises LaunchError where ray is missing, the cluster cannot be reached, or it has no room for the job in time.
    """
    try:
        import ray
    except ImportError:
        raise LaunchError("--on ray needs ray, which is not installed", "pip install 'polyaccel[ray]'") from None
    try:
        ray.init(address=settings.address, ignore_reinit_error=True, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"the Ray cluster at {settings.address!r} cannot be reached: {error}",
            "start one with `ray start --head`, or name yours with --ray.address",
        ) from error
    return _on_cluster(ray, job, settings)


def _on_cluster(ray: Any, job: Job, settings: RaySettings) -> int:
    count = job.settings.num_machines
    group = ray.util.placement_group(
        [_bundle(settings)] * count, strategy="STRICT_SPREAD" if count > 1 and not settings.share_machines else "PACK"
    )
    if not ray.util.placement_group_table(group) or not group.wait(timeout_seconds=settings.wait_s):
        ray.util.remove_placement_group(group)
        raise LaunchError(
            f"the Ray cluster has no room for {count} machines with {_bundle(settings)} each within {settings.wait_s} s",
            "ask for less (--ray.cpus-per-machine, --num-machines), or wait longer (--ray.wait-s)",
        )
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    try:
        actors = [
            ray.remote(_Machine)
            .options(**resources(settings), scheduling_strategy=strategy(group, placement_group_bundle_index=rank))
            .remote()
            for rank in range(count)
        ]
        address, port = ray.get(actors[0].address.remote())
        place = [f"--num-machines={count}", f"--main-process-ip={address}", f"--main-process-port={port}"]
        waiting = {
            actor.run.remote(
                _command(job, *(place if count > 1 else ()), *([f"--machine-rank={rank}"] if count > 1 else ()))
            ): rank
            for rank, actor in enumerate(actors)
        }
        while waiting:
            [done], _ = ray.wait(list(waiting), num_returns=1)
            rank = waiting.pop(done)
            try:
                code = ray.get(done)
            except ray.exceptions.RayError as error:
                print(f"polyaccel launch: machine {rank} of {count} was lost: {error}", file=sys.stderr)
                return 1
            if code:
                print(f"polyaccel launch: machine {rank} of {count} failed with exit code {code}", file=sys.stderr)
                return int(code)
        return 0
    finally:
        ray.util.remove_placement_group(group)  # ends the actors, and with them what they run


def _command(job: Job, *place: str) -> list[str]:
    return [sys.executable, "-m", "polyaccel.cli.main", *job.launch_command(*place)[1:]]


def _bundle(settings: RaySettings) -> dict[str, float]:
    amounts = {"CPU": settings.cpus_per_machine, "GPU": settings.gpus_per_machine, "TPU": settings.tpus_per_machine}
    return {name: amount for name, amount in amounts.items() if amount}
