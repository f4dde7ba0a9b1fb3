"""The engine's random numbers: one base key and a counter. Draw n is the same number on every mesh and in every rerun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import CheckpointError


class RandomStream:
    """The counter lives on the device and comes back, one higher, from every program that draws: nothing is sent per step."""

    def __init__(self, seed: int, place: Callable[[list[object]], list[jax.Array]]) -> None:
        self._place = place
        # Programs take the words of the key: jit handles a typed key array in Python, 4 us at every call.
        words = jax.random.key_data(jax.random.key(seed))
        self.base: jax.Array = place([words])[0]
        # The shapes of a plan have no words.
        self.key: jax.Array = jax.random.wrap_key_data(self.base if isinstance(self.base, jax.Array) else words)
        self.count = 0
        self._counters: dict[int, jax.Array] = {}

    def counter(self, draw: int | None) -> jax.Array:
        """The number of a draw as a device array (None: of the next one)."""
        number = self.count if draw is None else draw
        found = self._counters.get(number)
        if found is None:
            found = self._counters[number] = self._place([np.uint32(number)])[0]
        return found

    def spent(self, draw: int | None, following: jax.Array | None) -> None:
        """Note that a draw was used; `following` is the next number, as the program that used it gave it back (None: it did not)."""
        if following is None:
            return
        used = self.count if draw is None else draw
        if used + 1 >= self.count:
            # The used one stays: a backward pass that belongs to a forward pass draws it again.
            self._counters = {used: self._counters[used], used + 1: following}
            self.count = used + 1

    def read(self) -> dict[str, int | bytes]:
        """The words of the base key, and the number of the next draw."""
        return {"base": np.asarray(self.base.addressable_data(0)).astype("<u4").tobytes(), "count": self.count}

    def write(self, state: Mapping[str, Any]) -> None:
        """Continue with what `read` gave. Raises CheckpointError for a key of another kind."""
        words = np.frombuffer(state["base"], "<u4").astype(np.uint32)
        if words.shape != self.base.shape:
            raise CheckpointError(
                f"the random key was saved with {words.size} words, and jax's keys have {self.base.size} here",
                "set jax_default_prng_impl to what it was when the checkpoint was written",
            )
        self.base = self._place([words])[0]
        self.key = jax.random.wrap_key_data(self.base)
        self.count = int(state["count"])
        self._counters = {}


def draw_key(base: jax.Array, counter: jax.Array) -> jax.Array:
    """The key of one draw, from the words of the base key; traceable."""
    return jax.random.fold_in(jax.random.wrap_key_data(base), counter)


def next_counter(counter: jax.Array) -> jax.Array:
    """The number after this one; traceable."""
    return counter + jnp.uint32(1)
