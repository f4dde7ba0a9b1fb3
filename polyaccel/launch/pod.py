"""A job on a TPU slice: one gcloud call that starts `polyaccel launch` on every worker, and a table of how each of them ended."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

from polyaccel.config.schema import TpuPodSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.cluster import Job, find_tool, shell_lines

_MARK = "polyaccel-worker"
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes"
# Workers of a slice know each other from the metadata server; launch/schedulers.py reads these two variables.
_PLACE = f"""metadata() {{ curl -fsS -H 'Metadata-Flavor: Google' "{_METADATA}/$1"; }}
export TPU_WORKER_ID="${{TPU_WORKER_ID:-$(metadata agent-worker-number)}}"
export TPU_WORKER_HOSTNAMES="${{TPU_WORKER_HOSTNAMES:-$(metadata worker-network-endpoints | tr , '\\n' | cut -d: -f3 | paste -sd,)}}\""""


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """How one worker ended: its host name and the exit code of its command."""

    worker: str
    exit_code: int


def remote_script(job: Job, pod: TpuPodSettings) -> str:
    """The shell text that every worker runs; the first command that fails ends it, and its last line says how it ended."""
    report = f"""trap 'code=$?; echo "{_MARK} $(hostname) exit $code"' EXIT"""
    workdir = ["cd", pod.workdir] if pod.workdir else None
    return shell_lines(report, _PLACE, workdir, pod.setup, job.launch_command())


def command(job: Job, pod: TpuPodSettings) -> list[str]:
    """The gcloud call as an argument list. Raises LaunchError where the TPU has no name."""
    if pod.name is None:
        raise LaunchError(
            "--tpu_pod.name is not given", "name the TPU VM: `gcloud compute tpus tpu-vm list` shows yours"
        )
    place = [f"--{key}={value}" for key, value in (("zone", pod.zone), ("project", pod.project)) if value]
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", pod.name),
        *place,
        "--worker=all",
        f"--command={remote_script(job, pod)}",
    ]


def run(job: Job, pod: TpuPodSettings) -> int:
    """Run the job, pass its output on, print the table; returns 0 only if gcloud and every worker ended with 0."""
    arguments = command(job, pod)
    find_tool("gcloud", cure="install the Google Cloud CLI, or print the command with --emit")
    results: list[WorkerResult] = []
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as gcloud:
        assert gcloud.stdout is not None
        for line in gcloud.stdout:
            result = parse(line)
            if result is None:
                print(line, end="", flush=True)
            else:
                results.append(result)
    print(table(results, gcloud.returncode), file=sys.stderr)
    failed = next((result.exit_code for result in results if result.exit_code), 0)
    return failed or gcloud.returncode or (0 if results else 1)


def parse(line: str) -> WorkerResult | None:
    """The result that a worker's last line tells, or None for any other line."""
    match = re.search(rf"{_MARK} (\S+) exit (\d+)\s*$", line)
    return WorkerResult(match[1], int(match[2])) if match else None


def table(results: list[WorkerResult], gcloud_code: int) -> str:
    """One line per worker, and what gcloud itself said."""
    lines = [f"  {r.worker:30} {'ok' if r.exit_code == 0 else f'failed with exit code {r.exit_code}'}" for r in results]
    if gcloud_code:
        lines.append(
            f"  gcloud failed with exit code {gcloud_code}: a worker that is not listed did not get to the end"
        )
    elif not results:
        lines.append("  no worker told how it ended")
    return "\n".join(["workers:", *lines])
