"""What is recorded of a script for `polyaccel compare`, and how two recordings are held against each other."""

import json
import math

import numpy as np
import pytest
from doubles import accelerator

from polyaccel.errors import ConfigError, TrackerError
from polyaccel.testing.fake import FakeLoader, FakeModel, FakeSGD
from polyaccel.tracking.comparison import Recording, compare, rows

ROWS, BATCH = 24, 4


def train(
    tmp_path, monkeypatch, name="a", steps=0, *, form="backward", lr=0.1, start=0.5, clip=False, end=True, scale=1.0
):
    """Train a line on the fake engine for two epochs; the recording, and how many losses the script itself saw."""
    monkeypatch.setenv("POLYACCEL_RECORD", str(tmp_path / name))
    monkeypatch.setenv("POLYACCEL_RECORD_STEPS", str(steps))
    one = accelerator(tmp_path / "runs")
    x = np.linspace(-1, 1, ROWS * 2, dtype=np.float32).reshape(ROWS, 2)
    model = FakeModel(np.full((2, 1), start), np.zeros(1))
    loader = FakeLoader({"x": x, "y": scale * (x.sum(1, keepdims=True) + 1)}, BATCH)
    model, optimizer, loader = one.prepare(model, FakeSGD(model, lr), loader)

    def loss_fn(model, batch):
        return model.squared_error(batch["x"], batch["y"])

    max_norm = 0.1 if clip else None
    step = one.train_step(loss_fn, model, optimizer, max_grad_norm=max_norm) if form == "fused" else None
    seen = []
    try:
        for _ in range(2):
            for batch in loader:
                if form == "fused":
                    seen.append(float(step(batch)))
                    continue
                if form == "call":
                    seen.append(float(one.backward(loss_fn, model, batch)))
                else:
                    loss = loss_fn(model, batch)
                    seen.append(loss.item())
                    one.backward(loss)
                if clip:
                    one.clip_grad_norm_(model, 0.1)
                optimizer.step()
                optimizer.zero_grad()
        if end:
            one.end_training()
    except SystemExit as left:
        if left.code != 0:
            raise
    return Recording(name, tmp_path / name), seen, model


@pytest.mark.parametrize("form", ["call", "fused"])
def test_every_loss_and_the_parameters_of_a_whole_script_are_recorded(tmp_path, monkeypatch, form):
    recording, seen, model = train(tmp_path, monkeypatch, form=form)
    assert [value for _, value in recording.losses] == pytest.approx(seen)
    assert [step for step, _ in recording.losses] == list(range(12))
    assert len(recording.grad_norms) == (12 if form == "fused" else 0)  # nobody computes norms in the other form
    assert recording.facts["num_updates"] == 12
    assert recording.facts["backend"] == "fake"
    assert recording.facts["compile_s"] is None
    assert recording.facts["peak_memory_bytes"] > 2**20
    np.testing.assert_array_equal(recording.parameters("start")["0.weight"], np.full((2, 1), 0.5))
    np.testing.assert_array_equal(recording.parameters("end")["0.weight"], model.params["weight"])


@pytest.mark.parametrize("form", ["backward", "call", "fused"])
@pytest.mark.parametrize("steps", [5, 6, 8])  # 6: where the loader ends
def test_a_script_is_ended_after_so_many_updates(tmp_path, monkeypatch, steps, form):
    whole, _, _ = train(tmp_path, monkeypatch, "whole", form="call")
    part, _, model = train(tmp_path, monkeypatch, "part", steps, form=form)
    assert len(part.losses) == part.facts["num_updates"] == steps
    assert part.losses == whole.losses[:steps]
    assert part.facts["step_s"] > 0
    np.testing.assert_array_equal(part.parameters("end")["0.weight"], model.params["weight"])


def test_gradient_norms_are_those_before_the_clip_at_their_step(tmp_path, monkeypatch):
    recording, _, _ = train(tmp_path, monkeypatch, steps=3, form="call", clip=True)
    assert [step for step, _ in recording.grad_norms] == [0, 1, 2]
    assert recording.grad_norms[0][1] > 0.1


def test_a_fused_step_tells_the_norms_of_its_updates_and_takes_the_same_updates(tmp_path, monkeypatch):
    clipped, _, model = train(tmp_path, monkeypatch, "clipped", form="call", clip=True)
    fused, _, same = train(tmp_path, monkeypatch, "fused", form="fused", clip=True)
    assert fused.grad_norms == clipped.grad_norms
    assert fused.losses == clipped.losses
    np.testing.assert_array_equal(same.params["weight"], model.params["weight"])
    asked, _, _ = train(tmp_path, monkeypatch, "asked", form="fused")
    alone, _, _ = train(tmp_path, monkeypatch, "alone", form="call")
    assert asked.losses == alone.losses  # a norm that is only asked for clips nothing
    assert asked.grad_norms[0] == clipped.grad_norms[0]


def test_nobody_is_asked_for_norms_where_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv("POLYACCEL_RECORD", raising=False)
    calls = []
    monkeypatch.setattr("polyaccel.testing.fake.FakeEngine.clip_grad_norm", lambda *args: calls.append(args))
    one = accelerator(tmp_path / "runs")
    model = FakeModel(np.ones((2, 1)), np.zeros(1))
    model, optimizer = one.prepare(model, FakeSGD(model, 0.1))
    step = one.train_step(lambda model, batch: model.squared_error(*batch), model, optimizer)
    step((np.ones((4, 2), np.float32), np.ones((4, 1), np.float32)))
    assert calls == []


def test_the_peak_of_a_device_is_that_of_the_fullest_and_none_is_none(tmp_path, monkeypatch):
    recording, _, _ = train(tmp_path, monkeypatch)
    assert recording.facts["peak_device_memory_bytes"] is None
    cells = {line[0]: line[1:] for line in rows([recording], [])}
    assert cells["peak memory of a device"] == ["-"]
    for index, used in enumerate((3 * 2**20, 7 * 2**20)):
        file = tmp_path / "a" / f"facts-{index}.json"
        file.write_text(json.dumps({**recording.facts, "peak_device_memory_bytes": used}))
    two = Recording("a", tmp_path / "a")
    assert {line[0]: line[1:] for line in rows([two], [])}["peak memory of a device"] == ["7 MiB"]


def test_nothing_is_recorded_and_nothing_is_wrapped_where_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("POLYACCEL_RECORD", raising=False)
    one = accelerator(tmp_path / "runs")
    assert one._observer is None
    loader = one.prepare(FakeLoader({"x": np.zeros((4, 2))}, 2))
    assert loader.before_batch == []


def test_a_folder_is_recorded_to_once(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="has a recording already"):
        train(tmp_path, monkeypatch)


def against(first, second, tolerance=1e-3):
    return compare(first[0], second[0], tolerance=tolerance, parameter_tolerance=0.01)


def test_two_equal_runs_are_safe_to_switch_between(tmp_path, monkeypatch):
    same = against(*(train(tmp_path, monkeypatch, name, 8, form="call", clip=True) for name in "ab"))
    assert same.objections == []
    assert same.verdict.startswith(
        "safe to switch from a to b, as far as 8 steps show: 8 losses, gradient norms, parameters"
    )


def test_the_step_at_which_losses_part_is_named(tmp_path, monkeypatch):
    different = against(
        train(tmp_path, monkeypatch, "a", form="call"), train(tmp_path, monkeypatch, "b", form="call", lr=0.11)
    )
    assert different.loss.first_step == 1  # the first loss is computed before any update
    assert "losses part at step 1" in different.verdict
    assert "parameters at the end differ" in different.verdict
    assert different.verdict.startswith("NOT shown to be safe")
    cells = {line[0]: line[1:] for line in rows([different.reference, different.other], [different])}
    assert cells["first diverging step"] == ["", "1"]
    assert cells["last gradient norm"] == ["-", "-"]
    assert cells["compile time"] == ["-", "-"]


def test_runs_that_start_from_different_parameters_are_told_of(tmp_path, monkeypatch):
    runs = [train(tmp_path, monkeypatch, name, form="call", start=start) for name, start in (("a", 0.5), ("b", 0.6))]
    assert "started from different parameters: call set_seed" in against(*runs).objections[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_parts_from_one_that_is_and_agrees_with_its_like(tmp_path, monkeypatch):
    runs = {
        name: train(tmp_path, monkeypatch, name, form="call", scale=scale)
        for name, scale in (("a", 1.0), ("b", math.nan), ("c", math.nan))
    }
    parted = against(runs["a"], runs["b"])
    assert parted.loss.first_step == 0
    assert "parameters at the end differ by nan%" in parted.verdict
    assert against(runs["b"], runs["c"]).loss.first_step is None


def test_runs_with_different_global_batches_are_told_of(tmp_path, monkeypatch):
    runs = [train(tmp_path, monkeypatch, name, form="call") for name in "ab"]
    file = tmp_path / "b" / "facts-0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_data_shards": 4}))
    assert "their batches are not the same: 1 and 4 data shards" in against(*runs).verdict


def test_a_shorter_run_is_no_proof(tmp_path, monkeypatch):
    runs = train(tmp_path, monkeypatch, "a", form="call"), train(tmp_path, monkeypatch, "b", 4, form="call")
    assert "one run recorded fewer losses" in against(*runs).verdict


def test_a_recording_without_its_end_is_refused(tmp_path, monkeypatch):
    good = train(tmp_path, monkeypatch, "a", form="call")
    (tmp_path / "b").mkdir()
    with pytest.raises(TrackerError, match="no complete recording"):
        compare(good[0], Recording("b", tmp_path / "b"), tolerance=1, parameter_tolerance=1)


def test_processes_are_averaged_and_their_shards_put_together(tmp_path):
    from safetensors.numpy import save_file

    for index, loss in enumerate((1.0, 3.0)):
        (tmp_path / f"values-{index}.jsonl").write_text(json.dumps({"step": 0, "loss": loss}) + "\n")
        places = json.dumps({"0": ["0.w", [4], [2 * index]]})
        save_file({"0": np.full(2, index, np.float32)}, tmp_path / f"end-{index}.safetensors", {"places": places})
    recording = Recording("two", tmp_path)
    assert recording.losses == [(0, 2.0)]
    np.testing.assert_array_equal(recording.parameters("end")["0.w"], [0, 0, 1, 1])
