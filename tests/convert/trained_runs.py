"""A small training of several parts, run by polyaccel or by Accelerate, and what of it must be the same after a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polyaccel.checkpoint import open_checkpoint
from polyaccel.checkpoint.formats.bundle import of_saved

NUM_STEPS = 3


class Average:
    """An object of the user's that is saved with the rest."""

    def __init__(self) -> None:
        self.mean = torch.zeros(2)
        self.count = 0
        self.history = np.zeros(3)

    def update(self, value: torch.Tensor) -> None:
        self.history[self.count % 3] = self.count
        self.count += 1
        self.mean = self.mean + value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count, self.history = state["mean"], state["count"], state["history"]


class Net(nn.Module):
    """Two layers, and a buffer that grows with every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)
        self.register_buffer("num_calls", torch.tensor(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return self.last(torch.tanh(self.norm(self.first(inputs))))


class Training:
    """Model, optimizer with two groups, schedule with milestones and a registered object, prepared by an accelerator."""

    def __init__(self, accelerator: Any, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = Net()
        named = list(model.named_parameters())
        # Biases first: the optimizer's order is not the model's.
        groups = [
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for name, p in named if not name.endswith("bias")]},
        ]
        self.names = [name for name, _ in named if name.endswith("bias")]
        self.names += [name for name, _ in named if not name.endswith("bias")]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)
        self.accelerator = accelerator
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.average = Average()
        accelerator.register_for_checkpointing(self.average)
        self.batches = torch.from_numpy(np.random.default_rng(1).standard_normal((20, 8, 3)).astype(np.float32))

    def train(self, start: int, stop: int) -> list[float]:
        """Losses of these steps; every second one draws a random number."""
        losses = []
        for step in range(start, stop):
            outputs = self.model(self.batches[step] + 0.1 * torch.rand(()))
            loss = outputs.square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.update(outputs.detach().mean(0))
            losses.append(loss.item())
        return losses

    def weights(self) -> dict[str, np.ndarray]:
        """The model's state_dict as numpy arrays."""
        state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}


def bits(folder: Path) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Every array of a checkpoint of ours."""
    groups = of_saved(open_checkpoint(folder)).groups
    return {
        group: {name: (a.dtype, a.shape, np.asarray(a.read()).tobytes()) for name, a in arrays.items()}
        for group, arrays in groups.items()
    }
