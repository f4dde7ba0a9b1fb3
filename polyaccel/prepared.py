"""What user code holds for a prepared optimizer, whatever engine and dialect made it: one class to ask for."""

from __future__ import annotations

from typing import Any


class OptimizerHandle:
    """The base of every optimizer that `prepare` returns; Accelerate calls it AcceleratedOptimizer.

    `step` and `zero_grad` do nothing while gradients accumulate. `step_was_skipped` tells whether the last real step left the
    parameters alone; a script that leaves steps out for reasons of its own may say so with `_is_overflow`, until the next real step.
    """

    _is_accelerate_prepared = True  # Accelerate's mark of what has been through prepare
    _told_overflow: bool | None = None

    def step(self, closure: Any = None) -> Any:
        """Update the parameters, if this micro batch closes the accumulation window."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, if this micro batch closes the accumulation window."""
        raise NotImplementedError

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last real step left the parameters alone, because of gradients that were not finite (fp16)."""
        raise NotImplementedError

    def train(self) -> None:
        """Reaches optimizers that have a training mode (schedule-free ones)."""
        own: Any = getattr(self, "optimizer", None)
        if hasattr(own, "train"):
            own.train()

    def eval(self) -> None:
        """Reaches optimizers that have an evaluation mode (schedule-free ones)."""
        own: Any = getattr(self, "optimizer", None)
        if hasattr(own, "eval"):
            own.eval()

    @property
    def _is_overflow(self) -> bool:
        return self.step_was_skipped

    @_is_overflow.setter
    def _is_overflow(self, value: bool) -> None:
        self._told_overflow = bool(value)
