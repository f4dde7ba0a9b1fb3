"""Processes with different numbers of batches: metrics, joined training, and what is refused."""

import subprocess
from pathlib import Path

from launching import launch_command


def test_three_processes_with_unequal_loops_count_every_sample_and_train_to_the_end():
    script = Path(__file__).with_name("uneven_job.py")
    done = subprocess.run(launch_command("torch", 3, script), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("uneven inputs hold") == 1
