"""What stands in place of an array: its shape, dtype and place on devices that are not here. User code that asks for a value gets zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

_on_read: list[Callable[[], None]] = []  # of the planner that is at work


def tell_reads(listener: Callable[[], None] | None) -> None:
    """Call this whenever a value is asked for (None: nobody listens any more)."""
    _on_read[:] = [] if listener is None else [listener]


@final
class PlannedArray(jax.ShapeDtypeStruct):
    """A ShapeDtypeStruct that scripts can treat as the array it stands for, as far as they do before a first update.

    Its values are zeros, and the plan says that somebody asked for them.
    """

    __slots__ = ()

    is_fully_addressable = True
    is_fully_replicated = True

    @property
    def nbytes(self) -> int:
        """Of the whole array."""
        return int(self.size) * int(self.dtype.itemsize)

    def is_ready(self) -> bool:
        """There is nothing to wait for."""
        return True

    def block_until_ready(self) -> PlannedArray:
        """There is nothing to wait for."""
        return self

    def copy_to_host_async(self) -> None:
        """There is nothing to copy."""

    def astype(self, dtype: Any) -> PlannedArray:
        """The same in another dtype."""
        return PlannedArray(self.shape, jnp.dtype(dtype), sharding=self.sharding)

    def item(self) -> Any:
        """Zero."""
        return np.asarray(self).item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        for listener in _on_read:
            listener()
        if jax.dtypes.issubdtype(self.dtype, jax.dtypes.prng_key):
            raise TypeError("a random key has no values that numpy knows")
        return np.zeros(self.shape, self.dtype if dtype is None else dtype)

    def __float__(self) -> float:
        return float(np.asarray(self))

    def __int__(self) -> int:
        return int(np.asarray(self))

    def __bool__(self) -> bool:
        return bool(np.asarray(self))

    def __format__(self, spec: str) -> str:
        return format(np.asarray(self).item(), spec) if not self.shape else format(str(self), spec)


def part_bytes(array: Any) -> int:
    """Bytes of the part of an array that one device holds."""
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(tuple(array.shape))
    dtype = array.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return int(words.size) * int(words.dtype.itemsize)
    return int(np.prod(shape, dtype=np.int64)) * int(dtype.itemsize)
