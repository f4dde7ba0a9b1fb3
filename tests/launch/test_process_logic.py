"""What processes do together beside a step: triggers, debug mode, local SGD, on two real processes."""

import os
import subprocess
from pathlib import Path

import pytest
from launching import launch_command

HERE = Path(__file__).parent


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_processes_agree_on_triggers_mistakes_and_averages(backend):
    pytest.importorskip("torch")
    pytest.importorskip(backend)
    two_devices = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # per jax process
    done = subprocess.run(
        launch_command(backend, 2, "--debug", HERE / "launched_process_logic.py"),
        capture_output=True,
        text=True,
        timeout=300,
        env=two_devices,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the logic of processes holds") == 1
