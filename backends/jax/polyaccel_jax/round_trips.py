"""Reshapes that a program takes back: what was only cast in between is cast in the shape that it had.

Torch's linear layers flatten (batch, length, features) for every product and restore it after, and losses flatten again. XLA:TPU makes all
of it three-dimensional, in a layout in which the next product cannot flatten it: it copies the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from polyaccel_jax.jaxprs import bind


class RoundTrips:
    """Runs equations one after the other, of one trace."""

    def __init__(self) -> None:
        # By the id of a value: the value (which keeps the id its own), the same before it was reshaped, and the casts since.
        self._before: dict[int, tuple[jax.Array, jax.Array, tuple[Any, ...]]] = {}

    def bind(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
        """The results of an equation."""
        name = eqn.primitive.name
        is_reshape = name == "reshape" and eqn.params["dimensions"] is None
        if not is_reshape and name != "convert_element_type":
            return bind(eqn, inputs)
        (value,) = inputs
        _, source, casts = self._before.get(id(value), (value, value, ()))
        if is_reshape and source is not value and source.shape == tuple(eqn.params["new_sizes"]):
            for cast in casts:
                (source,) = bind(cast, [source])
            return [source]
        outs = bind(eqn, inputs)
        if is_reshape or source is not value:
            self._before[id(outs[0])] = (outs[0], source, casts if is_reshape else (*casts, eqn))
        return outs
