"""DistributedDataParallel as it was asked for, and what compression does to gradients: two gloo processes answer, ddp_job.py asks."""

from __future__ import annotations

from pathlib import Path

import ddp_job
import pytest
import torch
from gloo_jobs import answers_of

from polyaccel import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from polyaccel.errors import ConfigError, PlanError

JOB = Path(ddp_job.__file__)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """What process 0 and process 1 answered."""
    return answers_of(JOB, tmp_path_factory.mktemp("ddp"), 2, warnings="default")


def means(answers, step):
    """Weight and bias gradients, averaged over the processes by hand."""
    return [
        (torch.tensor(a) + torch.tensor(b)) / 2 for a, b in zip(*(one["own"][step] for one in answers), strict=True)
    ]


def test_the_process_group_is_the_one_that_was_asked_for(answers):
    assert answers[0]["joined"] == [77, 77.0, "gloo"]


def test_gradients_without_a_hook_are_the_mean(answers):
    for step in range(3):
        for given, expected in zip(answers[0]["no"][step], means(answers, step), strict=True):
            torch.testing.assert_close(torch.tensor(given), expected)


def test_a_narrow_exchange_rounds_gradients_to_its_dtype(answers):
    for given, expected in zip(answers[0]["fp16"][0], means(answers, 0), strict=True):
        given = torch.tensor(given)
        assert (given == given.half().float()).all()  # the sum was made in it
        # Each of the two is rounded once, and their sum: in units of the larger one.
        largest = max(torch.tensor(one["own"][0][0]).abs().max() for one in answers)
        assert (given - expected).abs().max() <= 2.0**-10 * largest
    assert answers[0]["fp16"][0] != answers[0]["no"][0]


def test_bf16_without_nccl_is_refused_by_name(answers):
    assert [text.partition(" needs NCCL")[0] for text in answers[0]["bf16"]] == [
        "ddp_comm_hook='bf16'",
        "ddp_comm_wrapper='bf16'",
    ]


@pytest.mark.parametrize(("hook", "tolerance"), [("power_sgd", 1e-5), ("power_sgd_fp16", 2e-3)])
def test_power_sgd_exchanges_a_matrix_of_the_rank_that_was_asked_for(answers, hook, tolerance):
    def second_singular_value(step):
        values = torch.linalg.svdvals(torch.tensor(answers[0][hook][step][0]).view(16, 32))
        return (values[1] / values[0]).item()

    assert second_singular_value(0) > 0.1  # not yet: the first steps are exchanged whole
    assert second_singular_value(2) < tolerance
    bias, expected = torch.tensor(answers[0][hook][2][1]), means(answers, 2)[1]
    torch.testing.assert_close(bias, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_batched_power_sgd_exchanges_the_whole_bucket_as_one_matrix(answers):
    weight, bias = (torch.tensor(one) for one in answers[0]["batched_power_sgd"][2])

    def ratio(parts):
        # 528 numbers in a matrix of 23 x 23: its last row is not whole.
        values = torch.linalg.svdvals(torch.cat(parts)[: 22 * 23].view(22, 23))
        return (values[1] / values[0]).item()

    assert min(ratio([weight, bias]), ratio([bias, weight])) < 1e-5
    assert ratio(means(answers, 2)) > 0.1


@pytest.mark.parametrize("hook", ["no", "fp16", "power_sgd", "power_sgd_fp16", "batched_power_sgd"])
def test_every_process_has_the_same_gradients_after_the_exchange(answers, hook):
    assert answers[0][hook] == answers[1][hook]


def test_the_settings_reach_distributed_data_parallel(answers):
    assert answers[0]["ddp"] == [[15, True, False, True], [25, False, True, False]]


def test_unused_parameters_are_found_when_asked_for(answers):
    assert answers[0]["unused_parameters"] == ["trained", True]


def test_buffers_are_those_of_process_0_unless_they_are_not_to_be(answers):
    assert [one["buffers"][0][1] for one in answers] == [1.0, 1.0]
    assert [one["buffers"][1] for one in answers] == [[1.0, 1.0], [2.0, 2.0]]


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(PlanError, match="process_group='nccl' needs GPUs"):
        Accelerator(backend="torch", cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="nccl")])
    with pytest.raises(ConfigError, match="ddp_comm_wrapper='fp16' wraps nothing"):
        Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_wrapper="fp16")])
    with pytest.raises(ConfigError, match="are options of PowerSGD"):
        Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_state_option={"rank": 1})])
