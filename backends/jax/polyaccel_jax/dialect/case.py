"""The smallest training of the flax dialect: what `polyaccel doctor` and `polyaccel test` train on every engine that speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class FlaxCase:
    """A linear nnx model under optax.sgd (`polyaccel.case.Case`)."""

    dialect = "flax"
    has_schedulers = False

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def model(self, weight: Any, bias: Any) -> Linear:
        """An nnx.Module of two parameters."""
        return Linear(weight, bias)

    def optimizer(self, model: Any, lr: float) -> nnx.Optimizer[Any]:
        """With a momentum of 0, and so with a state, by which an optimizer is told from another model's."""
        return nnx.Optimizer(model, optax.sgd(lr, momentum=0.0), wrt=nnx.Param)

    def scheduler(self, optimizer: Any, gamma: float) -> None:
        """None: a schedule is the learning rate of an optax optimizer."""
        return None

    def loader(self, x: Any, y: Any, batch_size: int) -> Batches:
        """Batches of numpy arrays."""
        return Batches(x, y, batch_size)

    def loss(self, model: Any, batch: Any) -> Any:
        """The mean of the squares."""
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    def parameters(self, model: Any) -> Any:
        """The model itself."""
        return model

    def array(self, values: Any) -> Any:
        """On the default device."""
        return jnp.asarray(values)

    def weights(self, model: Any) -> dict[str, Any]:
        """Of a `Linear`."""
        return {"weight": np.asarray(model.weight[...]), "bias": np.asarray(model.bias[...])}


class Linear(nnx.Module):
    """x @ weight + bias."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.weight = nnx.Param(jnp.asarray(weight))
        self.bias = nnx.Param(jnp.asarray(bias))

    def __call__(self, x: Any) -> Any:
        """(batch, in) to (batch, out)."""
        return x @ self.weight[...] + self.bias[...]


class Batches:
    """Rows of two arrays in order, `batch_size` at a time; the backend declares it to be a loader."""

    def __init__(self, x: Any, y: Any, batch_size: int) -> None:
        self._x, self._y, self._size = np.asarray(x), np.asarray(y), batch_size

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._x), self._size):
            rows = slice(start, start + self._size)
            yield {"x": self._x[rows], "y": self._y[rows]}
