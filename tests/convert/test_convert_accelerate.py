"""Accelerate's save_state folder: it continues a run of ours, and we continue a run of its."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from trained_runs import NUM_STEPS, Training, bits

from polyaccel import Accelerator
from polyaccel.checkpoint import open_checkpoint
from polyaccel.checkpoint.convert import convert
from polyaccel.checkpoint.formats.bundle import Choices
from polyaccel.errors import CheckpointError

# Ours updates with torch's fused kernels, or in jax: the same formulas, rounded in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def ours(tmp_path: Path, backend: str = "torch") -> tuple[Training, Path]:
    run = Training(Accelerator(backend=backend, cpu=True, split_batches=True))
    run.train(0, NUM_STEPS)
    folder = tmp_path / "ours"
    run.accelerator.save_state(folder, blocking=True)
    return run, folder


def theirs(tmp_path: Path) -> tuple[Training, Path]:
    run = Training(accelerate.Accelerator(cpu=True))
    run.train(0, NUM_STEPS)
    folder = tmp_path / "theirs"
    run.accelerator.save_state(str(folder))
    return run, folder


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_accelerate_continues_a_run_of_ours(tmp_path: Path, backend: str) -> None:
    run, folder = ours(tmp_path, backend)
    done = convert(folder, tmp_path / "converted", "accelerate")
    weights = run.weights()
    losses = run.train(NUM_STEPS, NUM_STEPS + 4)

    other = Training(accelerate.Accelerator(cpu=True), seed=1)
    other.accelerator.load_state(str(tmp_path / "converted"))
    for name, value in other.weights().items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert other.average.count == NUM_STEPS
    assert isinstance(other.average.history, np.ndarray)
    assert other.schedule.scheduler.milestones == {2: 1, 5: 1}
    continued = other.train(NUM_STEPS, NUM_STEPS + 4)
    np.testing.assert_allclose(continued, losses, rtol=TOLERANCE)
    assert done.left_behind == (() if backend == "torch" else ("generators of the devices",))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_of_accelerates_continues_here(tmp_path: Path, backend: str) -> None:
    run, folder = theirs(tmp_path)
    weights, losses = run.weights(), run.train(NUM_STEPS, NUM_STEPS + 4)
    convert(
        folder, tmp_path / "converted", "polyaccel", choices=Choices(parameter_names={"optimizer": tuple(run.names)})
    )
    other = Training(Accelerator(backend=backend, cpu=True, split_batches=True), seed=1)
    other.accelerator.load_state(tmp_path / "converted")
    for name, value in other.weights().items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert other.average.count == NUM_STEPS
    np.testing.assert_allclose(other.train(NUM_STEPS, NUM_STEPS + 4), losses, rtol=TOLERANCE)


def test_there_and_back_is_exact(tmp_path: Path) -> None:
    _, folder = ours(tmp_path)
    convert(folder, tmp_path / "there", "accelerate")
    convert(tmp_path / "there", tmp_path / "back", "polyaccel")
    assert bits(tmp_path / "back") == bits(folder)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "back")
    assert after.shared["values"] == before.shared["values"]
    assert after.shared["parameter_names"] == before.shared["parameter_names"]
    assert after.own(0) == before.own(0)


def test_positions_are_never_guessed(tmp_path: Path) -> None:
    run, folder = theirs(tmp_path)
    with pytest.raises(CheckpointError, match="no file says which number is which") as caught:
        convert(folder, tmp_path / "converted", "polyaccel")
    assert "--parameter-names" in str(caught.value)
    in_model_order = tuple(name for name, _ in run.accelerator.unwrap_model(run.model).named_parameters())
    with pytest.raises(CheckpointError, match=r"has shape .*, which is said to stand there"):
        convert(
            folder, tmp_path / "converted", "polyaccel", choices=Choices(parameter_names={"optimizer": in_model_order})
        )
    with pytest.raises(CheckpointError, match="has 6 parameters, and 5 different names"):
        convert(
            folder,
            tmp_path / "converted",
            "polyaccel",
            choices=Choices(parameter_names={"optimizer": tuple(run.names[1:])}),
        )
    assert not (tmp_path / "converted").exists()


class Planted:
    """Loading its pickle would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_file_that_is_no_data_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    run, folder = theirs(tmp_path)
    torch.save(Planted(tmp_path / "ran"), folder / "custom_checkpoint_0.pkl")
    names = Choices(parameter_names={"optimizer": tuple(run.names)})
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0.pkl cannot be read as data") as caught:
        convert(folder, tmp_path / "converted", "polyaccel", choices=names)
    assert "--skip custom_checkpoint_0.pkl" in str(caught.value)
    skipping = Choices(parameter_names=names.parameter_names, skip=frozenset({"custom_checkpoint_0.pkl"}))
    convert(folder, tmp_path / "converted", "polyaccel", choices=skipping)
    assert not (tmp_path / "ran").exists()

    other = Training(Accelerator(backend="torch", cpu=True), seed=1)
    other.accelerator.load_state(tmp_path / "converted")  # the average, which is not in it, starts anew
    assert other.average.count == 0


def test_a_pickled_model_of_theirs_is_read_as_data(tmp_path: Path) -> None:
    run = Training(accelerate.Accelerator(cpu=True))
    run.train(0, 1)
    run.accelerator.save_state(str(tmp_path / "theirs"), safe_serialization=False)
    convert(
        tmp_path / "theirs",
        tmp_path / "converted",
        "polyaccel",
        choices=Choices(parameter_names={"optimizer": tuple(run.names)}),
    )
    model = bits(tmp_path / "converted")["model"]
    assert {name: bytes_ for name, (_, _, bytes_) in model.items()} == {
        n: v.tobytes() for n, v in run.weights().items()
    }


def test_values_of_every_process_are_kept(tmp_path: Path) -> None:
    run, folder = theirs(tmp_path)
    torch.manual_seed(5)
    second = torch.load(folder / "random_states_0.pkl", weights_only=False) | {
        "torch_manual_seed": torch.get_rng_state()
    }
    torch.save(second, folder / "random_states_1.pkl")
    convert(
        folder, tmp_path / "converted", "polyaccel", choices=Choices(parameter_names={"optimizer": tuple(run.names)})
    )
    saved = open_checkpoint(tmp_path / "converted")
    assert saved.num_processes == 2
    assert saved.own(1)["generators"]["torch"] == torch.get_rng_state().numpy().tobytes()
    assert saved.own(0)["generators"]["torch"] != saved.own(1)["generators"]["torch"]


def test_a_part_of_a_checkpoint_can_be_taken(tmp_path: Path) -> None:
    run, folder = ours(tmp_path)
    convert(folder, tmp_path / "part", "polyaccel", only=["model", "optimizer"])
    other = Training(Accelerator(backend="torch", cpu=True), seed=1)
    other.accelerator.load_state(tmp_path / "part")
    for name, value in other.weights().items():
        np.testing.assert_array_equal(value, run.weights()[name], err_msg=name)
    assert other.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 0.025
    assert other.schedule.scheduler.last_epoch == 0
    convert(folder, tmp_path / "weights", "polyaccel", only=["model"])
    with pytest.raises(CheckpointError, match="was not written by save_state"):
        other.accelerator.load_state(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="--only modle"):
        convert(folder, tmp_path / "none", "polyaccel", only=["modle"])


def test_names_that_torch_has_kept_need_no_file(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9))
    accelerator.backward(model(torch.ones(4, 3)).sum())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "theirs"))
    convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert set(bits(tmp_path / "converted")["optimizer"]) == {"weight.momentum_buffer", "bias.momentum_buffer"}


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polyaccel.cli.main import main

    run, folder = theirs(tmp_path)
    names = tmp_path / "names.json"
    names.write_text(json.dumps(run.names))
    target = str(tmp_path / "converted")
    assert (
        main(["checkpoint", "convert", str(folder), target, "--to", "polyaccel", "--parameter-names", str(names)]) == 0
    )
    said = capsys.readouterr().out
    assert "(accelerate) ->" in said
    assert "model (7), custom_0 (2), optimizer (18)" in said
    assert main(["checkpoint", "convert", str(folder), target, "--to", "polyaccel"]) == 1
    assert "exists already" in capsys.readouterr().err
