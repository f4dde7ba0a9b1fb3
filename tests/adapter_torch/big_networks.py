"""Small models with what makes big ones difficult: buffers, tied parameters, weights used without calling their module."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class Net(nn.Module):
    """236 bytes: linear1 64, batchnorm 72, linear2 100."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.batchnorm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.linear2(self.batchnorm(self.linear1(x)))
        return y if scale is None else y * scale


class TiedNet(nn.Module):
    """Token embedding and output projection are one parameter; a buffer that no checkpoint has."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(8.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(tokens) + self.positions
        return {"logits": self.head(self.block(hidden)), "hidden": hidden}


class Direct(nn.Module):
    """Uses its child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense.weight, self.dense.bias) * self.gain


def three_nets() -> nn.Sequential:
    """layer1, layer2, layer3."""
    return nn.Sequential(OrderedDict([("layer1", Net()), ("layer2", Net()), ("layer3", Net())]))


def evaluated(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with running statistics that are not their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "running_var" in name else -0.5))
    return model.eval()
