"""mesh.sequence over several processes: those that share a sequence have the same rows, and the training is that of one device."""

from __future__ import annotations

import numpy as np
import optax
import pytest
import sequence_processes as job
from asked_jobs import answers_of
from flax import nnx
from mesh_processes import plain_torch
from test_jax_tensor_axis import Gpt, next_token_loss, token_batches

MESH = {"data": 2, "sequence": 2}
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32 sums in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Four processes with one device each: 0 and 1 have the two halves of one sequence, 2 and 3 those of another."""
    plan = [["torch_gpt", MESH], ["flax_gpt", MESH]]
    folder = tmp_path_factory.mktemp("sequences")
    return answers_of("sequence_processes.py", plan, folder, num_processes=4, num_devices=1)


def test_six_torch_steps_of_two_forms_are_those_of_plain_torch(results):
    data = list(zip(*(tensor.split(job.SIZE) for tensor in job.pairs(6).tensors), strict=True))
    model, losses, norms = plain_torch(job.gpt, data, job.loss_fn)
    logits = model(data[-1][0]).detach().split(job.SIZE // 2)
    for process, result in enumerate(results):
        result = result["torch_gpt"]
        np.testing.assert_allclose(result["losses"], losses, **CLOSE)
        np.testing.assert_allclose(result["norms"], norms[:3], **CLOSE)
        # Adam moves what has no gradient but rounding, the bias of keys, by as much as anything else.
        np.testing.assert_allclose(result["logits"], logits[process // 2].ravel().numpy(), rtol=0, atol=1e-3)
        assert result["state"] == results[0]["torch_gpt"]["state"]


def test_processes_that_share_a_sequence_have_the_same_rows_and_count_them_once(results):
    data = job.pairs(6).tensors[0][:, 0].split(job.SIZE)
    for process, result in enumerate(results):
        result = result["torch_gpt"]
        assert result["feeds"] == [2, 2]
        assert result["rows"] == [batch.split(job.SIZE // 2)[process // 2].tolist() for batch in data]
        assert result["shapes"] == [[job.SIZE // 2, 16, 64]] * 3  # whole sequences in user code
        assert result["gathered"] == [job.SIZE, 16]


def test_flax_steps_are_those_of_one_device(results):
    model = Gpt(nnx.Rngs(0), length=job.FLAX_LENGTH)
    clipped = optax.chain(optax.clip_by_global_norm(job.MAX_NORM), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, clipped, wrt=nnx.Param)
    losses, gradients_of = [], nnx.jit(nnx.value_and_grad(next_token_loss))
    for batch in token_batches(4, job.FLAX_LENGTH):
        loss, gradients = gradients_of(model, batch)
        optimizer.update(model, gradients)
        losses.append(float(loss))
    for result in results:
        np.testing.assert_allclose(result["flax_gpt"]["losses"], losses, **CLOSE)
