"""mesh.sequence over several processes: those that share a sequence have the same rows, and the training is that of one device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import optax
import pytest
import sequence_processes as job
import torch
from flax import nnx
from test_jax_processes import start
from test_jax_tensor_axis import Gpt, next_token_loss, token_batches

MESH = {"data": 2, "sequence": 2}
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32 sums in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Four processes with one device each: 0 and 1 have the two halves of one sequence, 2 and 3 those of another."""
    plan = [["torch_gpt", MESH], ["flax_gpt", MESH]]
    arguments = [json.dumps(plan), str(tmp_path_factory.mktemp("sequences"))]
    files = start("sequence_processes.py", arguments, num_processes=4, num_devices=1, timeout=900)
    everyone = [json.loads(Path(file).read_text()) for file in files]
    return [{name: result for (name, *_), result in zip(plan, results, strict=True)} for results in everyone]


def test_six_torch_steps_of_two_forms_are_those_of_plain_torch(results):
    model = job.gpt(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms, given = [], [], job.pairs(6).tensors
    for batch in zip(*(tensor.split(job.SIZE) for tensor in given), strict=True):
        loss = job.loss_fn(model, batch)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), job.MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    logits = model(batch[0]).detach().split(job.SIZE // 2)
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
