"""The examples learn, and the demo shows it: run as a new user runs them, in few steps."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def run(script, *arguments, backend):
    with tempfile.TemporaryDirectory() as folder:  # where the run folder is made
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / script), "--backend", backend, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_digits_in_torch_are_learned(backend):
    found = re.search(r"accuracy ([\d.]+) on 360", run("digits_cnn.py", "--epochs", "4", backend=backend))
    assert float(found[1]) > 0.85


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_digits_in_flax_are_learned(backend):
    found = re.search(r"accuracy ([\d.]+) on 360", run("digits_flax.py", "--epochs", "4", backend=backend))
    assert float(found[1]) > 0.85


def test_the_gpt_learns_in_bf16(tmp_path):
    curve = tmp_path / "curve.json"
    few = ("--updates", "20", "--test-batches", "8")
    run("byte_gpt.py", *few, "--mixed-precision", "bf16", "--curve", str(curve), backend="jax")
    result = json.loads(curve.read_text())
    assert result["losses"][0] > 5.3  # ln 256 = 5.55: nothing is known yet
    assert result["losses"][-1] < 4.2
    assert len(result["losses"]) == 40
    assert result["bits_per_byte"] < 6.5  # of eight


def test_the_gpt_continues_from_its_newest_checkpoint(tmp_path):
    saved = ("--project", str(tmp_path), "--dropout", "0", "--test-batches", "1")
    run("byte_gpt.py", "--updates", "2", "--save-every", "1", *saved, backend="torch")
    said = run(
        "byte_gpt.py", "--updates", "5", "--resume", *saved, "--curve", str(tmp_path / "rest.json"), backend="torch"
    )
    assert f"continuing from {tmp_path / 'checkpoints' / 'checkpoint_1'}" in said
    assert len(json.loads((tmp_path / "rest.json").read_text())["losses"]) == 6  # three updates of two micro batches


def test_the_demos_table_and_picture_show_the_difference(tmp_path):
    import demo

    def run_of(losses):
        return {"devices": 1, "losses": losses, "steps_per_s": 2.0, "compile_s": 1.0, "accuracy": 0.5}

    runs = {"task": {"torch": run_of([2.0, 1.0]), "jax": run_of([2.0, 1.001])}}
    assert demo.difference([2.0, 1.001], [2.0, 1.0]) == pytest.approx(1e-3)
    assert "1.0e-03" in demo.table(runs)
    demo.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_every_example_names_the_launch_line_of_every_backend():
    for script in ("digits_cnn.py", "byte_gpt.py"):
        docstring = (EXAMPLES / script).read_text().split('"""')[1]
        for backend in ("torch", "jax", "xla"):
            assert f"polyaccel launch --backend {backend}" in docstring
