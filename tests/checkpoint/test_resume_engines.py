"""A run that is cut in two is the run that was not: bit for bit on one engine, and within rounding from one engine to another."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import with_devices

from polyaccel.checkpoint import open_checkpoint
from polyaccel.launch.rendezvous import Rendezvous, free_port
from polyaccel.registry import load_backend

pytest.importorskip("torch")
import resumed
from resumed import train

ENGINES = [name for name in ("torch", "jax", "xla") if load_backend(name).probe().is_usable]
CLOSE = 1e-5  # relative: both engines round float32 after every operation, and 50 updates add that up
CUT, END = 11, 61  # in the second of nine passes


def job(engine: str, num_processes: int, **arguments) -> list[dict]:
    """What `train` gave on each process of a job."""
    port = free_port()
    members = []
    for rank in range(num_processes):
        place = Rendezvous(rank, num_processes, rank, num_processes, "127.0.0.1", port).environment()
        environment = {**os.environ, **(place if num_processes > 1 else {}), **with_devices(1), "CPU_NUM_DEVICES": "2"}
        command = [sys.executable, resumed.__file__, json.dumps({"backend": engine, **arguments})]
        members.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        answers = [member.communicate(timeout=240) for member in members]
    finally:
        for member in members:
            member.kill()
    assert [member.returncode for member in members] == [0] * num_processes, "\n".join(said[1] for said in answers)
    return [json.loads(said[0].split("RESULT ")[1]) for said in answers]


def run(engine: str, folder: Path | None, **arguments) -> dict:
    """One process's training: in this one, or for xla in its own, whose autograd has not met another device before."""
    place = None if folder is None else str(folder)
    return job("xla", 1, folder=place, **arguments)[0] if engine == "xla" else train(engine, place, **arguments)


def cut_in_two(engine: str, folder: Path, *, cut: int, end: int, to: str | None = None, **options) -> tuple[dict, dict]:
    """What a run gave that was saved on its way, and what one gave that went on from there, with the seeds of another script."""
    whole = run(engine, folder, num_batches=end, save_at=cut, **options)
    rest = run(to or engine, folder, num_batches=end, load=True, seed=5, **options)
    assert rest["path"] == whole["path"]
    return whole, rest


def assert_same_rest(whole: dict, rest: dict, cut: int) -> None:
    assert rest["losses"] == whole["losses"][cut:]
    assert rest["weights"] == whole["weights"]


def largest_difference(rest: dict, whole: dict, cut: int) -> float:
    losses = whole["losses"][cut:]
    assert len(rest["losses"]) == len(losses)
    return max(abs(new - old) / abs(old) for new, old in zip(rest["losses"], losses, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_cut_in_mid_pass_and_mid_window_goes_on_bit_for_bit(engine, tmp_path):
    # Batch 10 is the third of pass 1, and the first of an accumulation window of two.
    whole, rest = cut_in_two(engine, tmp_path, cut=10, end=20, accumulate=2, dropout=0.2)
    assert "gradients" in open_checkpoint(whole["path"]).groups
    assert_same_rest(whole, rest, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_precision_and_the_fused_step_go_on_bit_for_bit(engine, tmp_path):
    precision = "fp16" if "fp16" in load_backend(engine).capabilities.mixed_precision else "bf16"
    whole, rest = cut_in_two(engine, tmp_path, cut=5, end=9, fused=True, mixed_precision=precision, dropout=0.2)
    assert_same_rest(whole, rest, 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_saving_changes_nothing(engine, tmp_path):
    saved = run(engine, tmp_path, num_batches=6, save_at=3, dropout=0.2)
    plain = run(engine, None, num_batches=6, dropout=0.2)
    assert (saved["losses"], saved["weights"]) == (plain["losses"], plain["weights"])


def test_loader_workers_read_the_same_samples_after_a_resume(tmp_path):
    if "torch" not in ENGINES:
        pytest.skip("needs torch")
    whole, rest = cut_in_two("torch", tmp_path, cut=10, end=16, workers=1)
    assert_same_rest(whole, rest, 10)


def test_a_run_may_be_cut_at_the_last_batch_of_a_pass(tmp_path):
    whole, rest = cut_in_two(ENGINES[0], tmp_path, cut=14, end=17)
    assert_same_rest(whole, rest, 14)


PAIRS = [(a, b) for a in ENGINES for b in ENGINES if a != b]


@pytest.mark.parametrize(("origin", "goal"), PAIRS)
@pytest.mark.parametrize("optimizer", ["AdamW", "momentum"])
def test_another_engine_continues_the_curve(origin, goal, optimizer, tmp_path):
    whole, rest = cut_in_two(origin, tmp_path, cut=CUT, end=END, to=goal, optimizer=optimizer)
    assert largest_difference(rest, whole, CUT) < CLOSE


# What they remember differs most: numbers beside arrays, arrays of other shapes, nothing before the first step.
@pytest.mark.parametrize("optimizer", ["Adafactor", "ASGD", "NAdam", "RMSprop", "SGD"])
def test_what_an_optimizer_remembers_reaches_another_engine(optimizer, tmp_path):
    if not PAIRS:
        pytest.skip("needs two engines")
    whole, rest = cut_in_two(*PAIRS[0][:1], tmp_path, cut=3, end=8, to=PAIRS[0][1], optimizer=optimizer)
    assert largest_difference(rest, whole, 3) < CLOSE


@pytest.mark.parametrize(("origin", "goal"), PAIRS)
def test_an_open_window_is_closed_by_another_engine(origin, goal, tmp_path):
    whole, rest = cut_in_two(origin, tmp_path, cut=3, end=12, to=goal, accumulate=2)
    assert "gradients" in open_checkpoint(whole["path"]).groups
    assert largest_difference(rest, whole, 3) < CLOSE


# -- two processes --------------------------------------------------------------------------------------------------------


@functools.cache
def saved_by_two_processes(folder: str) -> dict:
    """Two torch processes, saved in the middle of a window, where each holds gradients of its own; the whole run's numbers."""
    whole, other = job("torch", 2, folder=folder, num_batches=20, save_at=10, accumulate=2)
    assert whole["losses"] == other["losses"]
    shapes = [shape for _, shape in open_checkpoint(whole["path"]).arrays("gradients").values()]
    assert all(shape[0] == 2 for shape in shapes)  # one entry per process
    return whole


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    if "torch" not in ENGINES:
        pytest.skip("needs torch")
    return tmp_path_factory.mktemp("ddp")


@pytest.mark.engine("torch")
def test_two_processes_take_back_their_own_gradients(ddp):
    whole = saved_by_two_processes(str(ddp))
    rest, other = job("torch", 2, folder=str(ddp), num_batches=20, load=True, accumulate=2, seed=5)
    assert_same_rest(whole, rest, 10)
    assert rest["losses"] == other["losses"]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_on_any_engine_goes_on_from_two(engine, ddp):
    whole = saved_by_two_processes(str(ddp))
    (rest,) = job(engine, 1, folder=str(ddp), num_batches=20, load=True, accumulate=2, seed=5)
    assert largest_difference(rest, whole, 10) < CLOSE
