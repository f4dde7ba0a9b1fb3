"""The seam's part about averages: what an engine keeps of a model's parameters beside them, for `polyaccel.EMA`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol


class ParameterAverage(Protocol):
    """A moving average of a model's floating-point and complex parameters, on its devices. It starts as the parameters are.

    Averages have the parameter's dtype, and no less than float32: what one update adds is lost in 16 bits.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the averages by the parameter's name in the dialect, tied ones once."""
        ...

    def update(self, weight: float) -> None:
        """average += weight * (parameter - average). Waits for no device, and no value of `weight` compiles anew."""
        ...

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the parameters have the values of the averages, in their own dtypes; afterwards those that they had, exactly."""
        ...

    def read(self) -> dict[str, Any]:
        """The averages by name as numpy arrays of their own; waits for the device."""
        ...

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replace the averages by host arrays of all names, of the same shapes."""
        ...
