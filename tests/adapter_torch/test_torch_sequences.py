"""The sequence axis on the torch engine: four gloo processes answer sequence_job.py, and one process is what they must be equal to."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import sequence_job
import torch
from gloo_jobs import answers_of

JOB = Path(sequence_job.__file__)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """Those of each process."""
    return answers_of(JOB, tmp_path_factory.mktemp("sequences"), 4)


@functools.cache
def of_one_process(ask, folder=None):
    return ask({}, folder)


def assert_close(given, expected, tolerance=1e-5):
    """fp32 sums in another order."""
    torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mesh", sequence_job.MESHES)
def test_training_is_that_of_one_process(answers, mesh):
    expected = of_one_process(sequence_job.trained)
    for one in answers:
        found = one[f"trained, {mesh}"]
        assert_close(found["losses"], expected["losses"])
        assert_close(found["norms"], expected["norms"], 1e-4)  # norms are near 2: the same in relation


@pytest.mark.parametrize("mesh", sequence_job.MESHES)
def test_inside_a_model_each_process_has_its_part_of_every_sequence(answers, mesh):
    of_layer, of_block = of_one_process(sequence_job.trained)["bytes inside"]
    sizes = sequence_job.MESHES[mesh]
    for one in answers:
        found = one[f"trained, {mesh}"]["bytes inside"]
        assert found == [of_layer // sizes["sequence"] // sizes.get("tensor", 1), of_block // sizes["sequence"]]


def test_parameters_are_cut_by_the_other_axes_alone(answers):
    whole = of_one_process(sequence_job.trained)["parameters"]
    assert answers[0]["trained, sequence 4"]["parameters"] == whole
    assert answers[0]["trained, fsdp 2 x sequence 2"]["parameters"] <= whole / 2 + 64


def test_micro_batches_are_added_up_before_their_exchange(answers):
    losses, norms = of_one_process(sequence_job.accumulated)
    assert_close(answers[0]["accumulated"][0], losses)
    assert_close(answers[0]["accumulated"][1], norms, 1e-4)


def test_weights_count_samples_not_processes(answers):
    assert_close(answers[0]["weighted"], of_one_process(sequence_job.weighted))


def test_a_run_continues_on_a_mesh_without_the_axis(answers, tmp_path):
    assert_close(answers[0]["resumed"], of_one_process(sequence_job.resumed, tmp_path))


@pytest.mark.parametrize("name", sequence_job.OPERATIONS)
def test_what_a_model_does_with_its_sequences_gives_the_same(answers, name):
    expected = of_one_process(sequence_job.operations)[name]
    for one in answers:
        found = torch.tensor(one["operations"][name])
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-3)  # sums of up to 1024 numbers


def test_parts_of_a_sequence_have_noise_of_their_own_and_processes_agree(answers):
    sequences, table = answers[0]["noise"]
    assert all(one["noise"] == answers[0]["noise"] for one in answers)
    parts = torch.tensor(sequences)[0].chunk(4)
    assert not any(torch.equal(parts[0], other) for other in parts[1:])
    assert all(0.3 < part.float().mean() < 0.7 for part in parts)
    assert 0.3 < torch.tensor(table).float().mean() < 0.7


def test_what_cannot_be_cut_is_refused_by_name(answers):
    odd, nothing, written, drawn, filled, compiled, _ = answers[0]["refused"]
    assert "Gpt was called with mesh.sequence=4, and its sequences have length 15, which does not divide" in odd
    assert "none of its inputs is a tensor (batch, length, ...)" in nothing
    assert "the model writes in place (mul_)" in written
    assert (
        "the model writes in place (uniform_) into a tensor of shape (2, 8) that mesh.sequence has in summands" in drawn
    )
    assert (
        "the model writes in place (fill_) into a tensor of shape (2, 8) that mesh.sequence has in summands" in filled
    )
    assert "compile=True" in compiled


def test_a_model_is_as_before_after_a_call_that_was_refused(answers):
    model = sequence_job.gpt(0)
    with torch.no_grad():
        whole = model(torch.arange(sequence_job.LENGTH)[None]).double().sum()
    assert answers[0]["refused"][-1] == pytest.approx(float(whole), rel=1e-5)


def test_without_gradients_sequences_may_have_any_length(answers):
    assert answers[0]["any length"] == pytest.approx(of_one_process(sequence_job.evaluated_at_any_length), rel=1e-6)
