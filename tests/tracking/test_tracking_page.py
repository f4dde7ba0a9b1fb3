"""The examples of docs/tracking.md run as they stand there, one after the other in one folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tracking.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
# A name that another part of the script gives.
COMPLETE = [block for block in BLOCKS if "import" in block]


def test_every_complete_example_of_the_page_runs(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "notes.txt").write_text("notes")
    setup = (
        "import os; os.environ['POLYACCEL_BACKEND'] = 'fake'\n"
        "from polyaccel.registry import register_backend\n"
        "from polyaccel.testing.fake import FakeBackend\n"
        "register_backend(FakeBackend())\n"
    )
    outputs = []
    for block in COMPLETE:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", setup + block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        outputs.append(done.stdout)
    assert len(COMPLETE) == 5
    assert "99 0.01" in outputs[1]
    assert "finished {'lr': 0.001, 'model': {'width': 32}} ['loss']" in outputs[1]
    assert outputs[4] == "mine 1 {'loss': 0.5}\n"


def test_the_commands_of_the_page_exist():
    from polyaccel.cli.main import parser

    for line in re.findall(r"^polyaccel (.*)$", PAGE.read_text(), re.MULTILINE):
        parser().parse_args(line.split())
