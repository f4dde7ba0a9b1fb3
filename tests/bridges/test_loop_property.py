"""Random losses on the outputs of a prepared model, recorded and compiled: value and every gradient against torch."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import on_jax
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

torch.set_num_threads(1)
ROWS, WIDTH = 4, 3
Y = torch.tensor([0, 2, 1, 1])
PICKS = torch.tensor([3, 0, 0])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (4, 3) -> (4, 3)
        return torch.tanh(self.layer(x)) + 0.1 * x


# Each keeps the shape (4, 3); `w` is a number that changes from step to step, `p` the model's weight (3, 3).
STEPS = {
    "scale": lambda v, other, w, p: v * w + other / (2.5 + w),
    "smooth": lambda v, other, w, p: F.gelu(v) - torch.sigmoid(other) * 0.5,
    "softmax": lambda v, other, w, p: v.softmax(-1) + F.log_softmax(other, 0) * 0.1,
    "matmul": lambda v, other, w, p: v @ p + (v @ other.T) @ v * 0.1,
    "cat": lambda v, other, w, p: torch.cat([v[:2], other[2:]]) + torch.stack([v, other]).mean(0),
    "index": lambda v, other, w, p: v[PICKS[[0, 1, 2, 0]]] + other[:, [2, 0, 1]] + v[1:2],
    "where": lambda v, other, w, p: torch.where(other > 0.1, v, v * 0.5) + v.clamp(-0.8, 0.8),
    "reduce": lambda v, other, w, p: v - v.mean(0, keepdim=True) + other.pow(2).sum(-1, keepdim=True).sqrt() * 0.1,
    "detach": lambda v, other, w, p: v + other.detach() * v,
    "write": lambda v, other, w, p: written(v, other),
    "views": lambda v, other, w, p: v.T.reshape(ROWS, WIDTH) + other.flatten().view(WIDTH, ROWS).transpose(0, 1),
    "sort": lambda v, other, w, p: v.sort(-1).values + other.cumsum(0) * 0.1 + v.max(-1, keepdim=True).values,
    "einsum": lambda v, other, w, p: torch.einsum("ij,kj,kl->il", v, other, v) * 0.1 + F.layer_norm(v, (WIDTH,)),
    "quiet": lambda v, other, w, p: v * quiet(other),
    "parts": lambda v, other, w, p: torch.stack(v.unbind(1)[::-1], 1) + torch.cat(other.chunk(2), 0),
    "masked": lambda v, other, w, p: v.masked_fill(other < 0, 0.3) + F.normalize(other, dim=-1),
}
LOSSES = {
    "cross entropy": lambda v, w: F.cross_entropy(v, Y, label_smoothing=0.1),
    "squares": lambda v, w: F.mse_loss(v, torch.zeros_like(v)) * w,
    "smooth l1": lambda v, w: F.smooth_l1_loss(v, torch.ones_like(v) * 0.3),
    "picked": lambda v, w: -v.log_softmax(-1)[torch.arange(ROWS), Y].mean(),
    "gathered": lambda v, w: v.gather(1, Y[:, None]).pow(2).sum() * 0.1 + v.logsumexp(1).mean(),
    "divergence": lambda v, w: F.kl_div(v.log_softmax(-1), v.detach().flip(0).softmax(-1), reduction="batchmean"),
    "norm": lambda v, w: torch.norm(v) + v.abs().max(),
}


def written(v, other):
    out = v * 1.0
    out[:, 0] += other[:, 1]
    out[1].mul_(0.5)
    return out


@torch.no_grad()
def quiet(value):
    return value.abs() / (1 + value.abs())


operand = st.integers(0, 9)
program = st.tuples(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), operand, operand), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(sorted(LOSSES)), operand, st.sampled_from([1.0, 0.3, 2])), min_size=1, max_size=2
    ),
    st.integers(1, 2),  # forwards
    st.booleans(),  # read a value on the way
)


@pytest.fixture(scope="module")
def shared():
    """One prepared model for all programs: what one recording leaves behind would show in the next."""
    acc = on_jax()
    torch.manual_seed(0)
    return acc, acc.prepare(Small())


def loss_of(program, model, xs, w):
    steps, losses, num_forwards, reads = program
    values = [model(x) for x in xs[:num_forwards]]
    for name, first, second in steps:
        values.append(STEPS[name](values[first % len(values)], values[second % len(values)], w, model.layer.weight))
    if reads:
        values[-1].sum().item()
    return sum(weight * LOSSES[name](values[-1 - which % 2], w) for name, which, weight in losses)


def run(program, model, backward):
    torch.manual_seed(1)
    seen = []
    for w in (0.7, 1.3):
        loss = loss_of(program, model, [torch.randn(ROWS, 3), torch.randn(ROWS, 3)], w)
        backward(loss)
        seen.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    return seen


def check(program, acc, prepared):
    torch.manual_seed(0)
    expected = run(program, Small(), lambda loss: loss.backward())
    actual = run(program, prepared, acc.backward)
    torch.testing.assert_close([[t.clone() for t in one] for one in actual], expected, atol=5e-5, rtol=5e-4)


@given(program)
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking compiles for minutes
    suppress_health_check=list(HealthCheck),
)
def test_random_losses_have_torchs_values_and_gradients(shared, program):
    check(program, *shared)


def test_every_step_and_every_loss_occurs_once(shared):
    order = random.Random(0).sample(sorted(STEPS), len(STEPS))
    losses = sorted(LOSSES)
    for index in range(0, len(order), 4):
        steps = [(name, position, position + 1) for position, name in enumerate(order[index : index + 4])]
        chosen = [(losses[(index // 2 + one) % len(losses)], one, 0.5) for one in range(2)]
        check((steps, chosen, 2, index % 8 == 0), *shared)
