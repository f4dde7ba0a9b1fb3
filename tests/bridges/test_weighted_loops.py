"""Weighted backwards of an unmodified torch loop on jax: whatever the loop reads, and where one weight cannot be exact."""

import pytest
import torch
from torch import nn

from polyaccel import Accelerator
from polyaccel.errors import UnsupportedError

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
COUNTED = torch.arange(16) % 5 > torch.arange(16) // 6  # more of the first rows than of the last


class WithLoss(nn.Module):
    """Gives its own loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y, counted):
        errors = (self.layer(x) - y).square().mean(1)
        return (errors * counted).sum() / counted.sum().clamp(min=1), errors


def outside(model, rows):
    """The loss of the same rows, computed by the loop."""
    _, errors = model(X[rows], Y[rows], COUNTED[rows])
    return (errors * COUNTED[rows]).sum() / COUNTED[rows].sum().clamp(min=1)


def inside(model, rows):
    return model(X[rows], Y[rows], COUNTED[rows])[0]


def trained(accelerator, loss_of, *, reads=False, epochs=3, weight=lambda count: count):
    model = WithLoss()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.2))
    size = 16 // accelerator.gradient_accumulation_steps
    for _ in range(epochs):
        for start in range(0, 16, size):
            rows = slice(start, start + size)
            with accelerator.accumulate(model):
                loss = loss_of(model, rows)
                if reads:
                    assert loss.item() >= 0
                accelerator.backward(loss, weight=weight(COUNTED[rows].sum()))
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def expected():
    """Plain torch on the sixteen rows at once."""
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        inside(model, slice(0, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("partitioning", ["pmap", "sharding"])
@pytest.mark.parametrize("reads", [False, True])
def test_a_loop_that_reads_its_losses_is_weighted_all_the_same(expected, partitioning, reads):
    accelerator = Accelerator(backend="jax", partitioning=partitioning, gradient_accumulation_steps=2)
    torch.testing.assert_close(trained(accelerator, outside, reads=reads), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_the_model_computes_on_each_shard_is_refused_with_one_weight(reads):
    accelerator = Accelerator(backend="jax", gradient_accumulation_steps=2)
    assert accelerator.num_data_shards == 4
    with pytest.raises(UnsupportedError, match=r"the loss comes out of the model.*\nhint: .*partitioning=\"sharding\""):
        trained(accelerator, inside, reads=reads)


def test_in_one_program_over_the_global_batch_it_is_exact(expected):
    accelerator = Accelerator(backend="jax", partitioning="sharding", gradient_accumulation_steps=2)
    torch.testing.assert_close(trained(accelerator, inside), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_every_kind_share_the_programs():
    accelerator = Accelerator(backend="jax", partitioning="sharding", gradient_accumulation_steps=2)
    trained(accelerator, outside, epochs=1)
    kinds = iter([lambda n: n.item(), lambda n: n.numpy(), lambda n: n.double(), lambda n: n.item() * 0.37] * 2)
    model = WithLoss()
    model = accelerator.prepare(model)
    counts = []
    for kind in kinds:
        with accelerator.accumulate(model):
            accelerator.backward(outside(model, slice(0, 8)), weight=kind(COUNTED.sum()))
        counts.append(len(accelerator.compile_events))
    assert counts[2:] == [counts[1]] * 6  # one window compiles all there is


def test_gradients_of_inputs_are_refused_beside_a_weight():
    accelerator = Accelerator(backend="jax", partitioning="sharding")
    model = accelerator.prepare(WithLoss())
    x = X.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="an input's gradient"):
        accelerator.backward(model(x, Y, COUNTED)[0], weight=3)
