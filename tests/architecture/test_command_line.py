"""`polyaccel --help` answers at once, and the installed console script is the module that the tests import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import run_python

from polyaccel.cli.main import COMMANDS


def test_the_console_script_is_installed_and_prints_help() -> None:
    script = shutil.which("polyaccel", path=str(Path(sys.executable).parent))
    assert script, "pip install -e . makes it"
    result = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "launch" in result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_costs_less_than_100_ms_of_cpu(command: str) -> None:
    """argparse alone is 30 ms here and torchrun --help 1800; the bound leaves room for a slow machine, not for a framework."""
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import contextlib, io, json, sys, time\n"
        "start = time.process_time()\n"
        "from polyaccel.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({arguments})\n"
        "print(json.dumps((time.process_time() - start) * 1000))"
    )
    assert min(run_python(code) for _ in range(5)) < 100


def test_an_unknown_command_names_the_nearest_one_and_fails() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "polyaccel.cli.main", "lunch"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "launch" in result.stderr
