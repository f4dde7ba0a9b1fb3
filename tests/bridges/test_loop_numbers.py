"""Python numbers in a loop that change from step to step: never stale, and compiled once where they can be inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax
from loop_scripts import Net, batches, num_compiles, sgd, trained

torch.set_num_threads(1)
WEIGHTS = np.linspace(0, 1, 6)
WEIGHTS32 = WEIGHTS.astype(np.float32)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


ANNEALED = {
    "float": lambda i, m, x, y: loss(m, x, y) + (i / 1000) * m(x).pow(2).mean(),
    "int": lambda i, m, x, y: loss(m, x, y) * (i + 1),
    "numpy": lambda i, m, x, y: loss(m, x, y) * WEIGHTS[i] + WEIGHTS32[i] * m(x).mean(),
    "alpha": lambda i, m, x, y: torch.add(loss(m, x, y), m(x).mean(), alpha=0.1 * i),
    "power": lambda i, m, x, y: (m(x).abs() + 1).pow(1.5 + 0.1 * i).mean(),
    "clamp": lambda i, m, x, y: m(x).clamp(-0.1 * (i + 1), 0.1 * (i + 1)).mean() + m(x).pow(2).mean(),
    "where": lambda i, m, x, y: (
        torch.where(m(x) > 0.01 * i, m(x), 0.1 * i).mean() + m(x).masked_fill(m(x) < 0, -1.0 * i).mean()
    ),
    "double": lambda i, m, x, y: (m(x).double().mean() * (0.1 + 0.1 * i)).float(),
    "half": lambda i, m, x, y: (m(x).bfloat16() * (0.1 + 0.1 * i)).float().mean(),
    "integers": lambda i, m, x, y: (m(x).detach().argmax(-1) * (i + 1)).float().mean() * m(x).mean(),
}


@pytest.mark.parametrize("name", ANNEALED)
def test_a_number_that_changes_at_every_step_is_neither_stale_nor_compiled_anew(name):
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        losses, counts = [], []
        for step, (x, y) in enumerate(batches(6)):
            value = ANNEALED[name](step, model, x, y)
            acc.backward(value)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.detach())
            counts.append(num_compiles(acc))
        assert counts[1] == counts[-1]  # constants at first, inputs from the second step on
        return losses, dict(model.state_dict())

    assert_same_on_jax(script)


def test_dtypes_stay_those_of_torch():
    seen = []

    def loss_of(step, model, x, y):
        out = model(x)
        made = (
            out.bfloat16() * (0.5 + step),
            out.half().mean() * (0.5 + step),
            out.double().mean() * (0.5 + step),
            out.detach().argmax(-1) * (step + 1),
            out.detach().argmax(-1) * (0.5 + step),
            (out > 0) * (step + 2),
        )
        seen.append([value.dtype for value in made])
        return sum(value.float().mean() for value in made) + out.mean()

    assert_same_on_jax(lambda acc: trained(acc, loss_of), atol=1e-3, rtol=1e-2)  # half precision sums
    assert seen[:4] == seen[4:]


def test_zero_and_minus_zero_are_two_numbers():
    def loss_of(step, model, x, y):
        huge = model(x).detach().abs().sum() / (0.0, -0.0, 0.0, -0.0)[step]
        return torch.where(huge > 0, 1.0, 2.0) * loss(model, x, y)

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_one_and_one_point_zero_and_true_are_three_values():
    kinds = []

    def loss_of(step, model, x, y):
        count = model(x).detach().argmax(-1)
        made = count * (1, 1.0, True)[step % 3]
        kinds.append(made.dtype)
        return loss(model, x, y) + made.float().mean() * model(x).mean()

    assert_same_on_jax(lambda acc: trained(acc, loss_of, steps=6))
    assert kinds[:6] == kinds[6:]


def test_dims_slices_and_options_that_change_are_followed():
    def loss_of(step, model, x, y):
        out = model(x)
        return (
            out.sum(step % 2).pow(2).mean()
            + out[:, step % 3].mean()
            + out[step : step + 2].mean()
            + F.cross_entropy(out, y, reduction=("mean", "sum")[step % 2]) * 0.1
        )

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_an_index_array_of_numpy_may_be_written_between_steps():
    index = np.array([0, 1, 2])

    def loss_of(step, model, x, y):
        index[:] = [step % 3, (step + 1) % 3, 0]
        return model(x)[index].pow(2).sum() + model(x)[[step, 0]].sum() * 0.1

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_a_number_that_goes_into_the_model_may_change():
    class Tempered(Net):
        def forward(self, x, temperature, scale=1.0):
            return super().forward(x) / temperature * scale

    def script(acc):
        model = Tempered()
        model, optimizer = acc.prepare(model, sgd(model))
        counts = []
        for step, (x, y) in enumerate(batches(5)):
            acc.backward(F.cross_entropy(model(x, 1.0 + step / 10, scale=2.0 - step / 10), y))
            optimizer.step()
            optimizer.zero_grad()
            counts.append(num_compiles(acc))
        assert counts[1] == counts[-1]
        return dict(model.state_dict())

    assert_same_on_jax(script)
