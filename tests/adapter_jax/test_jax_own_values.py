"""Values without a batch dim that processes of a job have differently: each one's own in a loop, refused where there can be one."""

from __future__ import annotations

import numpy as np
import own_values_processes as job
import pytest
import torch
from asked_jobs import start

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def results():
    return start("own_values_processes.py", [], num_processes=job.NUM_PROCESSES, num_devices=2)


@pytest.fixture(scope="module")
def by_hand():
    """(the losses of each process, the parameters) of data parallel training: the mean of the processes' losses."""
    net = job.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(job.NUM_STEPS):
        each = [job.loop_loss(net, process, step) for process in range(job.NUM_PROCESSES)]
        torch.stack(each).mean().backward()
        losses.append([loss.item() for loss in each])
        optimizer.step()
        optimizer.zero_grad()
    return np.transpose(losses), {name: value.numpy().ravel() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
def test_a_recorded_loop_takes_each_processs_own_numbers_and_trains_one_model(results, by_hand, partitioning):
    losses, state = by_hand
    for result, expected in zip(results, losses, strict=True):
        np.testing.assert_allclose(result[partitioning]["losses"], expected, **CLOSE)
        for name, value in state.items():
            np.testing.assert_allclose(result[partitioning]["state"][name], value, err_msg=name, **CLOSE)
    assert results[0][partitioning]["state"] == results[1][partitioning]["state"]  # not merely close: they are copies


def test_a_program_of_all_processes_refuses_different_values_by_name(results):
    for result in results:
        said = result["refused sharding"]
        assert "processes 0 and 1 gave scaled_loss different values for float32 of shape ()" in said["function"]
        assert "processes 0 and 1 gave the loop of Shifted different values for float32 of shape (8,)" in said["model"]
        assert said["alike"] == "not at all"


def test_replicas_take_the_values_of_their_own_process(results):
    for result in results:
        assert set(result["refused pmap"].values()) == {"not at all"}


def test_constants_of_a_loop_that_differ_between_processes_are_named(results):
    for result in results:
        step, said = result["exponents"]
        assert step == 0
        assert "the loop of Shifted has pow(tensor, 2) on process 0 and pow(tensor, 3) on process 1" in said
        step, said = result["options"]
        assert step == 0
        assert (
            "the loop of Shifted has dropout(tensor, p=0.25, training=True, inplace=False) on process 0 and dropout("
            in said
        )
        assert "p=0.5, training=True, inplace=False) on process 1" in said


def test_what_one_process_alone_looks_at_is_its_own_business(results):
    for result in results:
        assert result["looks"] == [2, "nothing"]


def test_a_value_that_differs_in_a_later_step_alone_is_named_at_the_call_after_the_next_comparison(results):
    """Compared after 1, 2, 4, 8, 16 calls and then every 32: step 4 is the fifth call, step 8 the ninth."""
    for result in results:
        step, said = result["late"]
        assert step == 8
        assert (
            "scaled_loss has an input float32 of shape (), 2.0 on process 0 and an input float32 of shape (), 3.0 on process 1"
            in said
        )
