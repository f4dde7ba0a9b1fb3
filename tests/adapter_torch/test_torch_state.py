"""Model and optimizer state as named shards: read, put together, and refused when they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch_network import X, Y, accelerator, mean_squared_error, network, weights

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard


def test_model_and_optimizer_state_continue_a_run_bit_for_bit():
    def prepared(run):
        model = network()
        return run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))

    def train(run, model, optimizer, steps):
        step = run.train_step(mean_squared_error, model, optimizer)
        return [step((X, Y)).item() for _ in range(steps)]

    run = accelerator()
    model, optimizer = prepared(run)
    train(run, model, optimizer, 3)
    saved_model = list(run._engine.read_state(model))
    saved_optimizer = list(run._engine.read_state(optimizer))
    expected = train(run, model, optimizer, 3)
    assert {shard.name for shard in saved_model} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {shard.name for shard in saved_optimizer} >= {"0.weight.exp_avg", "2.bias.exp_avg_sq", "0.bias.step"}
    assert all(shard.data.dtype == np.float32 for shard in saved_model)

    fresh = accelerator()
    model, optimizer = prepared(fresh)
    fresh._engine.write_state(model, saved_model)
    fresh._engine.write_state(optimizer, saved_optimizer)
    assert train(fresh, model, optimizer, 3) == expected


def test_state_is_put_together_from_pieces_of_any_mesh():
    engine = accelerator()._engine
    model = nn.Linear(2, 4, bias=False)
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    pieces = [Shard("weight", (4, 2), (start, 0), "float32", whole[start : start + 2]) for start in (2, 0)]
    engine.write_state(engine.prepare_model(model), pieces)
    assert model.weight.tolist() == whole.tolist()
    with pytest.raises(CheckpointError, match="4 of 8 elements"):
        engine.write_state(model, pieces[:1])


def test_bfloat16_and_tied_parameters_survive():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, dtype=torch.bfloat16)
            self.b = nn.Linear(2, 2, dtype=torch.bfloat16)
            self.b.weight = self.a.weight

    engine = accelerator()._engine
    model, other = Tied(), Tied()
    shards = list(engine.read_state(engine.prepare_model(model)))
    assert [shard.name for shard in shards] == ["a.weight", "a.bias", "b.bias"]
    assert {shard.dtype for shard in shards} == {"bfloat16"}
    engine.write_state(engine.prepare_model(other), shards)
    assert torch.equal(other.a.weight, model.a.weight)
    assert other.b.weight is other.a.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[1:], "missing: 0.weight"),
        (lambda shards: [*shards, Shard("extra", (1,), (0,), "float32", np.zeros(1, np.float32))], "unknown: extra"),
        (
            lambda shards: [Shard("0.weight", (2,), (0,), "float32", np.zeros(2, np.float32)), *shards[1:]],
            r"\(2,\) in the checkpoint and \(8, 4\) in Sequential",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    engine = accelerator()._engine
    model = engine.prepare_model(network())
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        engine.write_state(model, change(list(engine.read_state(model))))
    assert all(map(torch.equal, weights(model), before))
