"""What a linear model under SGD computes, in numpy float64: the numbers that engines are held against. Needs no pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

GLOBAL_BATCH = 8
_rows = np.random.default_rng(7)
X = _rows.normal(size=(32, 3)).astype(np.float32)  # (rows, in)
Y = _rows.normal(size=(32, 2)).astype(np.float32)  # (rows, out)
WEIGHT = _rows.normal(size=(3, 2)).astype(np.float32)  # (in, out)
BIAS = np.zeros(2, np.float32)
LR = 0.1
# float32 accumulates about 1e-7 per operation; some hundred operations lead to the numbers compared here.
TOLERANCE = 2e-5


def reference(
    *,
    epochs: int = 1,
    accumulate: int = 1,
    max_norm: float | None = None,
    gamma: float = 1.0,
    skipped: Sequence[int] = (),
    x: Any = X,
    y: Any = Y,
    global_batch: int = GLOBAL_BATCH,
) -> tuple[list[float], Any, Any]:
    """(losses, weight, bias) of SGD on global batches, in float64; the updates after the losses numbered in `skipped` do not happen."""
    weight, bias, lr = WEIGHT.astype(np.float64), BIAS.astype(np.float64), LR
    losses, grads, count = [], [np.zeros_like(weight), np.zeros_like(bias)], 0
    for _ in range(epochs):
        for start in range(0, len(x), global_batch):
            rows, target = (
                x[start : start + global_batch].astype(np.float64),
                y[start : start + global_batch].astype(np.float64),
            )
            error = rows @ weight + bias - target
            losses.append(float((error**2).mean()))
            slope = 2 * error / error.size / accumulate
            grads = [grads[0] + rows.T @ slope, grads[1] + slope.sum(0)]
            count += 1
            if count % accumulate and start + global_batch < len(x):
                continue
            count = 0
            norm = np.sqrt(sum(float((g**2).sum()) for g in grads))
            factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm is not None else 1.0
            if len(losses) - 1 not in skipped:
                weight, bias = weight - lr * factor * grads[0], bias - lr * factor * grads[1]
            grads, lr = [np.zeros_like(weight), np.zeros_like(bias)], lr * gamma
    return losses, weight, bias


def number(value: Any) -> float:
    """A scalar of any framework as a float; torch warns when a value with gradients is converted by float() itself."""
    return float(value.item() if hasattr(value, "item") else value)


def on_host(value: Any) -> Any:
    """An array of any framework, on any device, as numpy."""
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)
