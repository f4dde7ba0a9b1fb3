"""A launched job that is signalled saves, leaves with 75, and goes on when it is launched again, as if it had never been interrupted."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import launch_command

from polyaccel.config.schema import PREEMPTED
from polyaccel.registry import load_backend

SCRIPT = Path(__file__).with_name("preempted_training.py")
JOBS = [
    pytest.param(name, count, id=f"{name}-{count}", marks=pytest.mark.slow)
    for name, count in (("torch", 2), ("jax", 2), ("xla", 1))
    if load_backend(name).probe().is_usable
]


def launch(backend, count, losses, project, *, pause_s=0.0):
    flags = ("--preemption", "save", "--grace-s", "60")
    command = launch_command(backend, count, *flags, SCRIPT, losses, project)
    # One device per process: the data are those of two batches of four.
    environment = {**os.environ, "PAUSE_S": str(pause_s), "XLA_FLAGS": "", "CPU_NUM_DEVICES": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(job):
    output, _ = job.communicate(timeout=240)
    return job.returncode, output


@pytest.mark.parametrize(("backend", "count"), JOBS)
def test_a_signalled_job_leaves_with_75_and_its_next_launch_computes_what_was_left(backend, count, tmp_path):
    whole, losses, project = tmp_path / "whole", tmp_path / "losses", tmp_path / "project"
    code, output = ended(launch(backend, count, whole, tmp_path / "other"))
    assert code == 0, output

    job = launch(backend, count, losses, project, pause_s=0.05)
    deadline = time.monotonic() + 200
    while not losses.exists() or losses.read_text().count("\n") < 5:
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while job.poll() is None:  # again and again, into the last moments of the processes
        job.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    code, output = ended(job)
    assert code == PREEMPTED, output
    before = losses.read_text()
    assert whole.read_text().startswith(before)
    assert before != whole.read_text()
    assert os.listdir(project / "checkpoints") == ["checkpoint_0"]

    code, output = ended(launch(backend, count, losses, project))
    assert code == 0, output
    assert losses.read_text() == whole.read_text()  # every bit of every loss, and none twice
