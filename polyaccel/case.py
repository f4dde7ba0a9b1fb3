"""The smallest training, as each dialect writes it: what `polyaccel doctor`, `polyaccel test` and the conformance suite train."""

from __future__ import annotations

from typing import Any, Protocol


class Case(Protocol):
    """A linear model under SGD in a dialect; every method returns the framework's own objects."""

    backend: str
    dialect: str
    has_schedulers: bool  # False where schedules live inside optimizers

    def model(self, weight: Any, bias: Any) -> Any:
        """x @ weight + bias, of numpy arrays (in, out) and (out,)."""
        ...

    def optimizer(self, model: Any, lr: float) -> Any:
        """Plain SGD."""
        ...

    def scheduler(self, optimizer: Any, gamma: float) -> Any:
        """lr *= gamma at each step; None where there are none."""
        ...

    def loader(self, x: Any, y: Any, batch_size: int) -> Any:
        """Rows of {"x": (in,), "y": (out,)} in order, from numpy arrays (rows, in) and (rows, out)."""
        ...

    def loss(self, model: Any, batch: Any) -> Any:
        """mean((model(x) - y) ** 2), as user code of the dialect."""
        ...

    def parameters(self, model: Any) -> Any:
        """What clip_grad_norm_ takes for a prepared model."""
        ...

    def array(self, values: Any) -> Any:
        """An array of the dialect."""
        ...

    def weights(self, model: Any) -> dict[str, Any]:
        """{"weight": (in, out), "bias": (out,)} of an unwrapped model, as numpy."""
        ...
