"""Host values of a recorded loop in a job of several processes: each process's own, and the operations on them use that one.

A value without a batch dim (flattened targets, a mixing factor, a count) may differ between processes. It enters as one flat array that
has each data shard's copy end to end: an array that said to be the same on all devices, and was not, would give any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import jax
import numpy as np

OWN = -2  # the "batch dim" of such a value
_MANY = 256


def laid(value: Any, num_local_shards: int) -> Any:
    """A host value as this process's part of the flat array."""
    return np.tile(np.asarray(value).reshape(-1), num_local_shards)


def taken(array: Any, num_processes: int, shape: tuple[int, ...]) -> Any:
    """Traced: the values of all processes, stacked."""
    size = int(np.prod(shape, dtype=np.int64))
    num_shards = array.shape[0] // size
    return array.reshape(num_processes, num_shards // num_processes, *shape)[:, 0]


def is_own(value: Any, axis: int | None) -> bool:
    """Whether a recording's input may be another one on each process: it comes from the host, and has no batch dim."""
    return axis is None and isinstance(value, np.ndarray | np.generic) and bool(np.size(value))


@final
class OwnNumbers:
    """Python numbers as inputs, placed once: most of them are constants of the script."""

    def __init__(self, place: Callable[[list[Any]], list[Any]], num_local_shards: int) -> None:
        self._place = place
        self._num_local_shards = num_local_shards
        self._placed: dict[tuple[str, bytes], Any] = {}

    def __call__(self, number: Any) -> Any:
        """The flat array of a number, which other processes may have differently."""
        key = number.dtype.str, number.tobytes()
        found = self._placed.get(key)
        if found is None:
            if len(self._placed) >= _MANY:  # they change from step to step
                self._placed.clear()
            with jax.enable_x64(True):
                found = self._placed[key] = self._place([laid(number, self._num_local_shards)])[0]
        return found
