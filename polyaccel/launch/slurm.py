"""A job as an sbatch script: one task per node, which is `polyaccel launch` and finds its place from Slurm's variables."""

from __future__ import annotations

import shlex

from polyaccel.config.schema import PREEMPTED, SlurmSettings
from polyaccel.launch.cluster import Job, run_tool


def script(job: Job, slurm: SlurmSettings) -> str:
    """The sbatch script.

    Slurm sends SIGTERM to the tasks of a preempted job. A script that saves and leaves in time counts as completed, and Slurm
    would not queue it again: so the job asks for that itself when its processes left with 75. A task that does so ends well for srun,
    which would otherwise kill the tasks that still leave; the first node's task says so in a file beside the batch shell.
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
    step = f"{slurm.setup} && {command}" if slurm.setup else command
    # Shells wait for what they run when they are signalled; without a trap they would end first. (An ignored signal would be ignored by
    # the command too: a trap that does nothing is not inherited.)
    lines += ["", "trap : TERM USR1"]
    if slurm.requeue:
        left = f'[ $code -ne {PREEMPTED} ] || {{ [ ! -e "$1" ] || echo left > "$1"; exit 0; }}'
        inner = f"trap : TERM USR1; {step}; code=$?; {left}; exit $code"
        lines += [
            "left=$(mktemp)",
            f'srun --kill-on-bad-exit=1 bash -c {shlex.quote(inner)} polyaccel "$left"',
            "code=$?",
            'if [ $code -eq 0 ] && [ -s "$left" ]; then',
            f"    code={PREEMPTED}",
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'rm -f "$left"',
        ]
    else:
        inner = f"{slurm.setup} && exec {command}" if slurm.setup else f"exec {command}"
        lines += [f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(inner)}", "code=$?"]
    return "\n".join([*lines, "exit $code", ""])


def submit(job: Job, slurm: SlurmSettings) -> str:
    """Hand the script to sbatch; returns the job's number. Raises LaunchError with sbatch's own words."""
    printed = run_tool(
        ["sbatch", "--parsable"],
        stdin=script(job, slurm),
        cure="run this where Slurm is installed, or print the script with --emit",
    )
    return printed.strip().split(";")[0]
