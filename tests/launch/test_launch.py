"""`polyaccel launch` as a user types it: real processes, honest exit codes."""

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import LAUNCH

from polyaccel.cli.main import main

HERE = Path(__file__).parent


def launch(*arguments, **options):
    return subprocess.run([*LAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def engines():
    found = importlib.util.find_spec
    return [name for name, module in (("torch", "torch"), ("jax", "jax")) if found(module) and found("torch")]


@pytest.mark.parametrize("backend", engines())
def test_every_collective_agrees_between_two_processes(backend):
    two_devices = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # per jax process
    done = launch(
        "--backend", backend, "--num-processes", 2, "--cpu", HERE / "launched_collectives.py", env=two_devices
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all collectives agree") == 1


def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n")
    started = time.monotonic()
    done = launch("--backend", "torch", "--num-processes", 2, "--cpu", script)
    assert done.returncode == 7
    assert "process 1 of 2 failed with exit code 7" in done.stderr
    assert time.monotonic() - started < 30


def test_a_signal_reaches_the_processes(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([*LAUNCH, "--backend", "torch", str(script)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 3


def test_settings_reach_the_script(tmp_path):
    script = tmp_path / "says.py"
    script.write_text(
        "import sys\nfrom polyaccel.config.resolve import resolve\nc = resolve({})\n"
        "print(c.backend, c.mixed_precision, c.gradient_accumulation_steps, c.split_batches, sys.argv[1:])\n"
    )
    done = launch(
        "--backend",
        "torch",
        "--mixed_precision",
        "bf16",
        "--gradient-accumulation-steps",
        4,
        "--split-batches",
        script,
        "--a",
        "b",
    )
    assert done.stdout == "torch bf16 4 True ['--a', 'b']\n", done.stderr


def test_a_module_is_started_by_name():
    done = launch("--backend", "torch", "-m", "json.tool", "--help")
    assert "usage" in done.stdout


def test_a_missing_script_and_a_wrong_count_are_refused_before_anything_starts(capsys):
    assert main(["launch", "nowhere.py"]) == 1
    assert "script 'nowhere.py' does not exist" in capsys.readouterr().err
    assert main(["launch", "--num-processes", "0", __file__]) == 1
    assert "flag --num-processes='0' must be at least 1" in capsys.readouterr().err
    assert main(["launch", "--backend", "torhc", __file__]) == 1
    assert "did you mean 'torch'" in capsys.readouterr().err


def test_help_and_version_need_no_framework(capsys):
    assert main(["--version"]) == 0
    assert main([]) == 0
    assert "launch" in capsys.readouterr().out
