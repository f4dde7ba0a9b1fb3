"""`remat` for torch modules on jax: the same training, from less memory, with state that a block may touch only once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backward_programs import kept_by
from torch import nn
from torch.nn import functional as F

from polyaccel import Accelerator
from polyaccel.errors import UnsupportedError

WIDTH, LENGTH, BATCH = 32, 32, 8


class Block(nn.Module):
    """Dropout, running statistics, an attribute and a cache among its inputs: what may not happen twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(LENGTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("gain", torch.ones(()))
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, cache: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        cache["kept"].append(x)
        y = self.norm(x) * self.gain.clone()
        self.gain.mul_(0.9)
        weights = (y @ y.transpose(1, 2)).softmax(-1) / len(cache["kept"])  # (batch, length, length)
        return x + self.down(F.gelu(self.up(self.dropout(weights @ y))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache: dict[str, list[torch.Tensor]] = {"kept": []}
        for layer in self.layers:
            x = layer(x, cache)
        return x.square().mean() + sum(kept.mean() for kept in cache["kept"])


def trained(remat: str) -> tuple[list[float], dict[str, np.ndarray], int]:
    """Losses, the state at the end, and bytes of temporaries of the compiled step."""
    torch.manual_seed(0)
    accelerator = Accelerator(backend="jax", compilation_cache="off", remat=remat)
    module = Stack()
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=1e-2))
    compiled = kept_by(accelerator._engine)
    losses = []
    for x in np.random.default_rng(0).normal(size=(3, BATCH, LENGTH, WIDTH)).astype(np.float32):
        loss = model(torch.from_numpy(x))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    size = max(one.memory_analysis().temp_size_in_bytes for one in compiled.values())
    return losses, {name: value.numpy() for name, value in model.state_dict().items()}, size


def test_state_and_losses_are_the_same_and_temporaries_smaller() -> None:
    losses, state, size = trained("none")
    for remat, fraction in (("full", 0.75), ("dots", 0.95)):
        again, state_again, smaller = trained(remat)
        np.testing.assert_allclose(again, losses, rtol=1e-5)
        for name, value in state.items():
            np.testing.assert_allclose(state_again[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert smaller <= fraction * size


def test_a_forward_that_is_an_attribute_is_not_replaced() -> None:
    accelerator = Accelerator(backend="jax", compilation_cache="off", remat="full")
    module = Stack()
    module.layers[0].forward = module.layers[0].forward
    model, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=1e-2))
    with pytest.raises(UnsupportedError, match="remat would replace the forward that a Block has"):
        accelerator.backward(model(torch.zeros(BATCH, LENGTH, WIDTH)))
