"""Parameters that forward writes to in place (Gemma 3n clamps some): they come out of the program, and the update starts from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax
from loop_scripts import batches, sgd
from semantics import assert_trains_as_torch
from torch import nn

torch.set_num_threads(1)


class Clamped(nn.Module):
    """Writes once through .data and once under no_grad, before and after the weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.decay = nn.Parameter(torch.ones(8))

    def forward(self, x):  # (batch, 6) -> (batch, 3)
        if self.training:
            self.body.weight.data.clamp_(-0.2, 0.2)
        out = self.head(torch.tanh(self.body(x)) * self.decay)
        if self.training:
            with torch.no_grad():
                self.decay.mul_(0.9)
        return out


def by_class(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_training_follows_torch_in_every_form(num_devices):
    forms = ("loop", "function", "fused") if num_devices == 1 else ("loop",)
    # The gradient of decay is taken where it was written to before the update, as torch does only through .data.
    assert_trains_as_torch(OnlyData, lambda: batches(4), by_class, forms=forms, optimizer=adam, num_devices=num_devices)


class OnlyData(Clamped):
    def forward(self, x):
        if self.training:
            self.body.weight.data.clamp_(-0.2, 0.2)
            self.decay.data.mul_(0.9)  # not the same twice
        return self.head(torch.tanh(self.body(x)) * self.decay)


def test_values_read_before_backward_and_two_forwards_per_step():
    def script(acc):
        model, optimizer = acc.prepare(net := OnlyData(), sgd(net))
        seen = []
        for index, (x, y) in enumerate(batches(5)):
            loss = F.cross_entropy(model(x), y)
            if index % 2:
                loss = loss + model(x * 0.5).pow(2).mean()
            if index > 1:
                seen.append(loss.item())
            acc.backward(loss)
            seen.append(model.decay.detach().clone())
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        with torch.no_grad():
            model(x).sum().item()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_early_reads_in_every_step():
    def script(acc):
        model, optimizer = acc.prepare(net := OnlyData(), sgd(net))
        seen = []
        for x, y in batches(4):
            loss = F.cross_entropy(model(x), y)
            seen += [model.decay[:2].tolist(), loss.item(), model.decay.sum().item(), model.decay.max().item()]
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_write_after_the_use():
    def script(acc):
        model = acc.prepare(Clamped())
        x = batches(1)[0][0]
        with torch.no_grad():
            seen = [model(x).clone() for _ in range(3)]
        return seen, model.decay.detach().clone()

    assert_same_on_jax(script)
