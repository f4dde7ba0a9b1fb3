"""A job as an sbatch script: one task per node, which is `polyaccel launch` and finds its place from Slurm's variables."""

from __future__ import annotations

import shlex

from polyaccel.config.schema import PREEMPTED, SlurmSettings
from polyaccel.launch.cluster import Job, run_tool


def script(job: Job, slurm: SlurmSettings) -> str:
    """The sbatch script.

    Slurm sends SIGTERM to the tasks of a preempted job. A script that saves and leaves in time counts as completed, and Slurm
    would not queue it again: so the job asks for that itself when its exit code is 75.
    """
    options: dict[str, object] = {
        "job-name": slurm.job_name,
        "nodes": job.settings.num_machines,
        "ntasks-per-node": 1,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "output": slurm.output,
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    if slurm.requeue:
        lines.append("#SBATCH --requeue")
    command = shlex.join(job.launch_command(f"--num-machines={job.settings.num_machines}"))
    inner = f"{slurm.setup} && exec {command}" if slurm.setup else f"exec {command}"
    # The batch shell waits for srun when it is signalled; without the trap it would end, and srun with it. (An ignored signal
    # would be ignored by srun too: a command that does nothing is not inherited.)
    lines += ["", "trap : TERM USR1", f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(inner)}", "code=$?"]
    if slurm.requeue:
        lines += [f"if [ $code -eq {PREEMPTED} ]; then", '    scontrol requeue "$SLURM_JOB_ID"', "fi"]
    return "\n".join([*lines, "exit $code", ""])


def submit(job: Job, slurm: SlurmSettings) -> str:
    """Hand the script to sbatch; returns the job's number. Raises LaunchError with sbatch's own words."""
    printed = run_tool(
        ["sbatch", "--parsable"],
        stdin=script(job, slurm),
        cure="run this where Slurm is installed, or print the script with --emit",
    )
    return printed.strip().split(";")[0]
