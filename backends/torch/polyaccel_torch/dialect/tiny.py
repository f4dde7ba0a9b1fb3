"""The smallest training of the torch dialect: what `polyaccel doctor` tries on every engine that speaks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from polyaccel.protocols import TinyTraining


def tiny_training(data: np.ndarray[Any, Any], batch_size: int) -> TinyTraining:
    """A linear model, (rows, columns) to (rows, 1), under plain SGD; its loss falls in the first step."""
    model = torch.nn.Linear(data.shape[1], 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(data)), batch_size=batch_size)
    return TinyTraining(model, torch.optim.SGD(model.parameters(), lr=0.01), loader, _loss)


def _loss(model: Any, batch: Any) -> Any:
    return ((model(batch[0]) - 3.0) ** 2).mean()
