"""`polyaccel plan` on scripts of both dialects: what it prints, what it refuses, and that nothing is trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyaccel.cli.main import main

FLAX = """
import argparse
import numpy as np, optax
from flax import nnx
from polyaccel import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=8)
args = parser.parse_args()
accelerator = Accelerator(project_dir="project")
accelerator.init_trackers("planned")
accelerator.log({"width": args.width})
model = accelerator.create_model(lambda: nnx.Linear(8, args.width, rngs=nnx.Rngs(0)))
model, optimizer = accelerator.prepare(model, optax.adamw(1e-3))
step = accelerator.train_step(lambda model, batch: (model(batch["x"]) ** 2).mean(), model, optimizer)
step({"x": np.ones((16, 8), np.float32)})
raise AssertionError("a plan ends with the first step")
"""

TORCH = """
import torch
from torch import nn
from polyaccel import Accelerator

accelerator = Accelerator()
model = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 8))
assert all(p.is_meta for p in model.parameters())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(64, 8)), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (x,) in loader:
    loss = (model(x) ** 2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    raise AssertionError("a plan ends with the first step")
"""


def plan(tmp_path: Path, text: str, *flags: str):
    script = tmp_path / "train.py"
    script.write_text(text, "utf-8")
    flags_and_script = ["plan", str(script), *flags] if "--" in flags else ["plan", *flags, str(script)]
    return main(flags_and_script)


def test_a_flax_script_is_planned_with_its_own_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(tmp_path, FLAX, "--topology", "cpu:4", "--mesh.fsdp", "4", "--", "--width", "16") == 0
    page = capsys.readouterr().out
    assert "cpu:4, 4 devices, fsdp=4: 144 parameters" in page
    assert "train_step of" in page
    assert "all-gather" in page
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]  # no run folder


def test_a_torch_script_is_planned_without_weights_in_memory(tmp_path, capsys):
    assert plan(tmp_path, TORCH, "--json", "--topology", "cpu:4", "--mesh.fsdp", "-1") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_parameters"] == 8 * 1024 + 1024 + 1024 * 8 + 8
    assert report["parameter_bytes"] == report["num_parameters"]  # a quarter of four bytes each
    assert report["optimizer_bytes"] >= report["parameter_bytes"]
    assert report["fits"] is None
    assert {one["kind"] for one in report["collectives"]} >= {"all-gather"}


def test_a_search_shares_the_devices_in_every_way(tmp_path, capsys):
    assert plan(tmp_path, FLAX, "--search", "--json", "--topology", "cpu:2") == 0
    meshes = [(tree["mesh"]["data"], tree["mesh"]["fsdp"]) for tree in json.loads(capsys.readouterr().out)]
    assert meshes == [(2, 1), (1, 2)]


def test_values_of_the_scripts_own_argument_are_tried_side_by_side(tmp_path, capsys):
    assert plan(tmp_path, FLAX, "--try", "width=4,8", "--topology", "cpu:2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data=2 --width 4 " in lines[1]
    assert "data=2 --width 8 " in lines[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--topology is not given"),
        (("--topology", "cpu:2", "--try", "width"), "NAME=A,B"),
        (("--topology", "v5e"), "v5e:4x4"),
        (("--topology", "cpu:2", "--backend", "torch"), "planned on jax"),
        (("--topology", "v5e:4x4", "--scale", "12"), "powers of two"),
        (("--topology", "gpu:512"), "the GPUs of this machine"),
        (("--topology", "cpu:2", "--timeout", "0"), "no time"),
        (("--topology", "cpu:2", "--search", "--search-axes", "data,layers"), "'layers' is no axis"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_runs(tmp_path, capsys, flags, words):
    assert plan(tmp_path, FLAX, *flags) == 1
    assert words in capsys.readouterr().err


def test_a_script_that_does_not_train_is_named_with_its_last_words(tmp_path, capsys):
    assert plan(tmp_path, "raise RuntimeError('no data here')", "--topology", "cpu:2") == 1
    assert "no data here" in capsys.readouterr().err


def test_a_step_that_takes_too_long_is_given_up(tmp_path, capsys):
    text = "import time; print('asleep', flush=True); time.sleep(120)"
    assert plan(tmp_path, text, "--topology", "cpu:2", "--timeout", "6") == 1
    words = capsys.readouterr().err
    assert "not done after 6 seconds" in words
    assert "asleep" in words
    assert "--timeout" in words


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_plan_that_is_killed_leaves_nothing_running(tmp_path, sent):
    pids = tmp_path / "pids"
    script = tmp_path / "train.py"
    # Without its engine, and with a process of its own, as loaders have.
    script.write_text(
        f"import os, time\nchild = os.fork()\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(120)\n",
        "utf-8",
    )
    plan = subprocess.Popen(
        [sys.executable, "-m", "polyaccel.cli.main", "plan", str(script), "--topology", "cpu:1"],
        stderr=subprocess.DEVNULL,
    )
    try:
        assert waited(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        plan.send_signal(sent)
        plan.wait(10)
        numbers = [int(text) for text in pids.read_text().split()]
        assert waited(lambda: not any(map(is_running, numbers)))
    finally:
        plan.kill()
        plan.wait(10)


def waited(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # one that has ended waits for whoever asks
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_search_goes_on_after_a_mesh_that_cannot_be_planned_and_ends_with_the_first_that_fits(tmp_path, capsys):
    text = "import os\nassert os.environ['POLYACCEL_MESH__FSDP'] != '1', 'parts only'\n" + FLAX
    assert plan(tmp_path, text, "--search", "--first", "--topology", "cpu:4") == 0
    page = capsys.readouterr().out
    assert "data=2 fsdp=2" in page
    assert "not planned: cpu:4 data=4: AssertionError: parts only" in page
    assert " fsdp=4" not in page
