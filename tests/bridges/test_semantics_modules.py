"""Models as Python objects: modes, attributes, buffers, what they return, copies, wrappers, and what is refused by name."""

from __future__ import annotations

import torch
from bridge_scripts import assert_same_on_jax
from semantics import assert_trains_as_torch, sgd
from torch import nn

torch.set_num_threads(1)


def rows(num: int = 3, size: int = 8, width: int = 4) -> list[torch.Tensor]:
    return [torch.randn(size, width) for _ in range(num)]


# -- modes and attributes --------------------------------------------------------------------------------------------------------


def test_a_mode_that_is_switched_between_forward_and_backward_counts_for_the_forward():
    def script(acc):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model, optimizer = acc.prepare(model, sgd(model))
        for x in rows():
            out = model(x)
            model.eval()
            acc.backward(out.pow(3).mean())
            model.train()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


class Configured(nn.Module):
    """Looks at a configuration object, a dict and a list of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.config = type("Config", (), {})()
        self.config.scale = 1.0
        self.options = {"shift": 0.0}
        self.powers = [1]

    def forward(self, x):
        return (self.layer(x) * self.config.scale + self.options["shift"]) ** self.powers[0]


def test_what_a_model_looks_up_counts_with_its_present_value():
    def change(model, step):
        if step == 1:
            model.config.scale = 3.0
        elif step == 2:
            model.options["shift"] = 1.0
        elif step == 3:
            model.powers[0] = 2

    assert_trains_as_torch(Configured, lambda: rows(4), before_step=change)
