"""Real trainings, and what happens around their checkpoints: the disk is full, another run is there, the environment holds secrets."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from polyaccel import Accelerator
from polyaccel.checkpoint import newest_checkpoint
from polyaccel.errors import CheckpointError
from polyaccel.registry import load_backend, register_backend
from polyaccel.testing.fake import FakeBackend, FakeLoader, FakeModel, FakeSGD

register_backend(FakeBackend())
ENGINES = [name for name in ("torch", "jax", "xla") if load_backend(name).probe().is_usable]
ROWS, COLUMNS = 8, 64 * 1024  # a megabyte or two of parameters: more than the limit below
LIMIT = 256 * 1024


@contextmanager
def small_disk():
    """No file of this process may grow above LIMIT bytes: what a full disk is to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def torch_training(backend, folder):
    """(accelerator, one step of a large linear model, its weight as numpy)."""
    torch = pytest.importorskip("torch")
    accelerator = Accelerator(backend=backend, cpu=True, project_dir=folder)
    torch.manual_seed(0)
    model = torch.nn.Linear(ROWS, COLUMNS, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = torch.ones(4, ROWS).to(accelerator.device)

    def step():
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    return accelerator, step, lambda: accelerator.get_state_dict(model)["weight"].detach().cpu().numpy().copy()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_is_said_at_the_next_call_and_training_may_go_on_from_the_previous_checkpoint(engine, tmp_path):
    accelerator, step, weight = torch_training(engine, tmp_path)
    step()
    accelerator.save_state(blocking=True)
    kept = weight()
    step()
    with small_disk():
        accelerator.save_state()  # copied, and on its way
        step()  # training goes on
        with pytest.raises(CheckpointError, match="checkpoint_1") as caught:
            accelerator.wait_for_checkpoint()
    assert caught.value.hint
    found, passed_over = newest_checkpoint(tmp_path / "checkpoints")
    assert found.path.endswith("checkpoint_0")
    assert passed_over == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "saving" in path.name] == []
    after = weight()
    assert not np.array_equal(after, kept)
    saved_at = accelerator.save_state(blocking=True)  # there is room again
    assert newest_checkpoint(tmp_path / "checkpoints")[0].path == saved_at
    accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    np.testing.assert_array_equal(weight(), kept)
    accelerator.load_state()
    np.testing.assert_array_equal(weight(), after)
    accelerator.end_training()


# -- two runs --------------------------------------------------------------------------------------------------------------

OTHER_RUN = """
import sys
import numpy as np
from polyaccel import Accelerator
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend, FakeModel, FakeSGD

register_backend(FakeBackend())
accelerator = Accelerator(backend="fake", project_dir=sys.argv[1])
model = FakeModel(np.full((2, 1), 5.0), np.zeros(1))
accelerator.prepare(model, FakeSGD(model, 0.1))
accelerator.save_state(blocking=True)
print("saved", flush=True)
sys.stdin.read()
accelerator.end_training()
"""


def fake_run(folder):
    accelerator = Accelerator(backend="fake", project_dir=folder)
    model = FakeModel(np.zeros((2, 1)), np.zeros(1))
    model, *_ = accelerator.prepare(model, FakeSGD(model, 0.1), FakeLoader({"x": np.zeros((4, 2))}, 2))
    return accelerator, model


@pytest.fixture
def other_run(tmp_path):
    """Another process that has saved into tmp_path, and will save again."""
    run = subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "saved\n"
    yield run
    run.kill()
    run.wait()
    run.stdin.close()
    run.stdout.close()


def test_a_second_run_may_neither_save_nor_resume_beside_the_first(other_run, tmp_path):
    accelerator, model = fake_run(tmp_path)
    for call in (accelerator.save_state, accelerator.load_state):
        with pytest.raises(CheckpointError, match=f"another run.*process {other_run.pid}"):
            call()
    assert model.params["weight"].max() == 0  # nothing was loaded
    assert os.listdir(tmp_path / "checkpoints").count("checkpoint_1") == 0
    assert accelerator.has_checkpoint


@pytest.mark.parametrize("end", ["kill", "end_training"])
def test_when_the_first_run_is_gone_the_second_goes_on_from_its_checkpoint(other_run, tmp_path, end):
    if end == "kill":
        other_run.kill()
    else:
        other_run.stdin.close()
    other_run.wait(30)
    accelerator = Accelerator(backend="fake", project_dir=tmp_path)
    model = FakeModel(np.zeros((2, 1)), np.zeros(1))
    accelerator.prepare(model, FakeSGD(model, 0.1))
    assert accelerator.load_state().endswith("checkpoint_0")
    assert model.params["weight"].min() == 5
    assert accelerator.save_state(blocking=True).endswith("checkpoint_1")
    accelerator.end_training()


def test_a_project_without_checkpoints_says_so(tmp_path):
    accelerator, _ = fake_run(tmp_path)
    assert not accelerator.has_checkpoint
    (tmp_path / "checkpoints" / ".checkpoint_0.0123456789abcdef.saving").mkdir(parents=True)
    assert not accelerator.has_checkpoint
    (tmp_path / "checkpoints" / "checkpoint_3").mkdir()  # somebody's empty folder
    assert not accelerator.has_checkpoint


# -- secrets ---------------------------------------------------------------------------------------------------------------

SECRETS = {
    "environment": "env-4d5e6f708192",
    "token": "hf_" + "Zx9" * 11,
    "argument": "arg-a1b2c3d4e5f6",
    "in a path": "sk-" + "proj0" * 8,
    "tracker config": "trk-0f1e2d3c4b5a",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_no_byte_of_a_project_holds_a_secret_of_the_environment_the_arguments_or_the_configuration(
    engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["environment"])
    monkeypatch.setenv("HF_TOKEN", SECRETS["token"])
    monkeypatch.setenv("POLYACCEL_COMPILATION_CACHE", str(tmp_path / "cache" / SECRETS["in a path"]))
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key", SECRETS["argument"]])
    project = tmp_path / "project"
    accelerator, step, _ = torch_training(engine, project)
    accelerator.init_trackers("secrets", config={"lr": 0.1, "password": SECRETS["tracker config"]})
    step()
    accelerator.save_state(blocking=True)
    accelerator.end_training()
    read = 0
    for path in project.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        read += len(data)
        for what, secret in SECRETS.items():
            assert secret.encode() not in data, f"{what}: {path}"
            assert secret not in str(path.relative_to(tmp_path)), what
    assert read > ROWS * COLUMNS * 4
    assert Path(newest_checkpoint(project / "checkpoints")[0].path).name == "checkpoint_0"
