"""The network, data and accelerator that the tests of the torch engine share."""

from __future__ import annotations

import torch
from torch import nn

from polyaccel import Accelerator

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))


def network(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def mean_squared_error(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def accelerator(**options) -> Accelerator:
    torch.set_num_threads(1)
    return Accelerator(backend="torch", cpu=True, **options)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def hand_written(optimizer_class, steps: int = 4, **options) -> tuple[list[float], list[torch.Tensor]]:
    model = network()
    optimizer = optimizer_class(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        loss = mean_squared_error(model, (X, Y))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights(model)
