"""The smallest training of the flax dialect: what `polyaccel doctor` tries on every engine that speaks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
from flax import nnx

from polyaccel.protocols import TinyTraining


def tiny_training(data: np.ndarray[Any, Any], batch_size: int) -> TinyTraining:
    """A linear model, (rows, columns) to (rows, 1), under plain SGD; its loss falls in the first step."""
    model = nnx.Linear(data.shape[1], 1, rngs=nnx.Rngs(0))
    batches = [{"x": data[start : start + batch_size]} for start in range(0, len(data), batch_size)]
    return TinyTraining(model, nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param), batches, _loss)


def _loss(model: Any, batch: Any) -> Any:
    return ((model(batch["x"]) - 3.0) ** 2).mean()
