"""The smallest training of the torch dialect: what `polyaccel doctor` and `polyaccel test` train on every engine that speaks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class TorchCase:
    """A linear model under SGD (`polyaccel.case.Case`)."""

    dialect = "torch"
    has_schedulers = True

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def model(self, weight: Any, bias: Any) -> torch.nn.Linear:
        """nn.Linear, which keeps its weight as (out, in)."""
        model = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight.T)))
            model.bias.copy_(torch.from_numpy(np.array(bias)))
        return model

    def optimizer(self, model: Any, lr: float) -> torch.optim.SGD:
        """Without momentum."""
        return torch.optim.SGD(model.parameters(), lr=lr)

    def scheduler(self, optimizer: Any, gamma: float) -> torch.optim.lr_scheduler.ExponentialLR:
        """ExponentialLR."""
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    def loader(self, x: Any, y: Any, batch_size: int) -> DataLoader[Any]:
        """A DataLoader that does not shuffle."""
        return DataLoader(_Rows(x, y), batch_size=batch_size)

    def loss(self, model: Any, batch: Any) -> Any:
        """mse_loss."""
        return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def parameters(self, model: Any) -> Any:
        """An iterator, as scripts pass it."""
        return model.parameters()

    def array(self, values: Any) -> torch.Tensor:
        """On the host."""
        return torch.from_numpy(np.array(values))

    def weights(self, model: Any) -> dict[str, Any]:
        """Of an nn.Linear on any device."""
        return {
            "weight": model.weight.detach().cpu().numpy().T.copy(),
            "bias": model.bias.detach().cpu().numpy().copy(),
        }


class _Rows(Dataset[Any]):
    def __init__(self, x: Any, y: Any) -> None:
        self._x, self._y = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self._x[row], "y": self._y[row]}
