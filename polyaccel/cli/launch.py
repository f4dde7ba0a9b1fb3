"""`polyaccel launch`: turns flags into the settings of workers and starts them, here or through a cluster's own program."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from polyaccel.cli.flags import add_setting_flags, flags_of
from polyaccel.errors import LaunchError

if TYPE_CHECKING:
    from polyaccel.config.resolve import Gathered
    from polyaccel.config.schema import LaunchSettings
    from polyaccel.launch.cluster import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `polyaccel launch`."""
    parser.add_argument(
        "--config-file",
        "--config_file",
        type=Path,
        help="TOML, YAML, or a YAML of Accelerate (default: polyaccel.toml here)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module name, as in python -m")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print what would be started, and start nothing"
    )
    parser.add_argument(
        "--emit", action="store_true", help="print the cluster's file or command, and hand nothing over"
    )
    parser.add_argument(
        "--multi-gpu", "--multi_gpu", action="store_true", help="backend torch on every GPU, as in Accelerate"
    )
    parser.add_argument("--tpu", action="store_true", help="backend xla, as in Accelerate (jax: --backend jax)")
    add_setting_flags(parser)
    parser.add_argument("script", help="the training script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def run(options: argparse.Namespace) -> int:
    """Start the workers and wait; returns the first failing worker's exit code, else 0."""
    from polyaccel.config.resolve import config_of, gather, section_of
    from polyaccel.config.schema import LaunchSettings

    gathered = gather(file=options.config_file, flags=_with_aliases(options, flags_of(options)))
    settings = section_of(gathered, LaunchSettings)
    config_of(gathered)  # every mistake is shown before a process starts
    command = ["-m", options.script] if options.module else [options.script]
    command += options.script_args
    if settings.on == "local":
        from polyaccel.launch.local import launch

        return launch(
            command,
            gathered=gathered,
            settings=settings,
            dry_run=options.dry_run or options.emit,
            ends_process=options.is_program,
        )
    emit = options.emit or options.dry_run
    return _on_cluster(command, gathered, settings, emit=emit, ends_process=options.is_program)


def _with_aliases(options: argparse.Namespace, flags: dict[str, str]) -> dict[str, str]:
    """Accelerate's switches that name an engine; one that contradicts --backend is a LaunchError."""
    for is_given, flag, backend in ((options.multi_gpu, "--multi_gpu", "torch"), (options.tpu, "--tpu", "xla")):
        if is_given and flags.setdefault("backend", backend) != backend:
            raise LaunchError(
                f"{flag} means --backend {backend}, and --backend {flags['backend']} is given", "keep one of the two"
            )
    if options.multi_gpu and "cpu" in flags:
        raise LaunchError("--multi_gpu and --cpu contradict each other", "keep one of the two")
    return flags


def _on_cluster(
    command: list[str], gathered: Gathered, settings: LaunchSettings, *, emit: bool, ends_process: bool
) -> int:
    from polyaccel.config.resolve import section_of
    from polyaccel.launch.cluster import Job

    if settings.on == "slurm" and "preemption" not in gathered.values:
        # Slurm signals a job that it preempts, and the script queues one that has saved again.
        gathered.add("preemption", "save", "launch --on slurm")
    job = Job.of(command, gathered, settings)
    _warn_of_secrets(command)
    if settings.on == "slurm":
        return _slurm(job, gathered, emit)
    if settings.on == "kubernetes":
        return _kubernetes(job, gathered, emit)
    if settings.on == "tpu-pod":
        from polyaccel.config.schema import TpuPodSettings
        from polyaccel.launch import pod

        place = section_of(gathered, TpuPodSettings)
        return _print(shlex.join(pod.command(job, place))) if emit else pod.run(job, place)
    if settings.on == "ray":
        from polyaccel.config.schema import RaySettings
        from polyaccel.launch import ray

        cluster = section_of(gathered, RaySettings)
        return (
            _print(f"{shlex.join(job.launch_command())}  # on each of {settings.num_machines}")
            if emit
            else ray.run(job, cluster)
        )
    if settings.on == "hosts":
        from polyaccel.config.schema import HostSettings
        from polyaccel.launch import hosts

        machines = section_of(gathered, HostSettings)
        return (
            _print("\n".join(map(shlex.join, hosts.commands(job, machines).values())))
            if emit
            else hosts.run(job, machines, ends_process=ends_process)
        )
    raise AssertionError(settings.on)  # the schema knows every target


def _warn_of_secrets(command: list[str]) -> None:
    """What the cluster is given must hold the arguments as they are: it is for the user to keep secrets out of them."""
    import sys

    from polyaccel.config.resolve import inherited_environment
    from polyaccel.redaction import Redaction

    shown = Redaction(inherited_environment()).arguments(command)
    if shown != command:
        print(
            f"polyaccel launch: warning: an argument looks like a secret, and the cluster will store it: {shlex.join(shown)}\n"
            "hint: give it to the script by an environment variable, or as a secret of the cluster",
            file=sys.stderr,
        )


def _slurm(job: Job, gathered: Gathered, emit: bool) -> int:
    from polyaccel.config.resolve import section_of
    from polyaccel.config.schema import SlurmSettings
    from polyaccel.launch import slurm

    options = section_of(gathered, SlurmSettings)
    if emit:
        return _print(slurm.script(job, options))
    number = slurm.submit(job, options)
    return _print(f"submitted as job {number}; its output goes to {options.output.replace('%j', number)}")


def _kubernetes(job: Job, gathered: Gathered, emit: bool) -> int:
    from polyaccel.config.resolve import section_of
    from polyaccel.config.schema import KubernetesSettings
    from polyaccel.launch import kubernetes

    backend = gathered.values.get("backend", "auto")
    tree = kubernetes.manifest(job, section_of(gathered, KubernetesSettings), backend=backend)
    return _print(kubernetes.text(tree) if emit else kubernetes.apply(tree))


def _print(text: str) -> int:
    print(text.rstrip("\n"))
    return 0
