"""Accelerate's rules about what two processes exchange while gradients accumulate, on two real processes."""

import subprocess
from pathlib import Path

import pytest
from launching import launch_command


def test_two_processes_exchange_gradients_when_a_window_closes_or_when_told():
    pytest.importorskip("torch")
    script = Path(__file__).parent / "launched_accumulation.py"
    done = subprocess.run(launch_command("torch", 2, script), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("accumulation holds") == 1
