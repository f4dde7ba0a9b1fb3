"""A small model and the loop around it, for tests of what user code may do between the model and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 6) -> (batch, 3)
        return self.head(self.drop(torch.tanh(self.body(x))))


def batches(num: int = 4, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (size, 6) and labels (size,) out of 3."""
    return [(torch.randn(size, 6), torch.randint(0, 3, (size,))) for _ in range(num)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(
    acc: Any,
    loss_of: Callable[..., torch.Tensor],
    *,
    steps: int = 4,
    model: nn.Module | None = None,
    after_backward: Callable[..., None] | None = None,
) -> Any:
    """Train with `loss_of(step, model, x, y)`; the losses and the final state."""
    model = model or Net()
    model, optimizer = acc.prepare(model, sgd(model))
    losses = []
    for step, (x, y) in enumerate(batches(steps)):
        loss = loss_of(step, model, x, y)
        acc.backward(loss)
        if after_backward:
            after_backward(step, model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, dict(model.state_dict())


def num_compiles(acc: Any) -> int:
    """Programs that were compiled so far; 0 by plain torch."""
    return acc._engine.num_compiles if hasattr(acc, "_engine") else 0
