"""A moving average of a model's parameters (`polyaccel.averages.ParameterAverage`): one program per update, the averages donated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel_jax.handles import JaxModel

Leaves = tuple[jax.Array, ...]


class ModelAverage:
    """Averages of a model's floating-point and complex parameters, placed as they are."""

    def __init__(self, model: JaxModel) -> None:
        self._model = model
        self._engine = engine = model.engine
        model.source.settle(for_writing=False)
        params = {name: leaf for name, leaf in model.params.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(leaf.shape) for name, leaf in params.items()}
        self._names = names = [model.full(name) for name in params]
        dtypes = tuple(jnp.promote_types(leaf.dtype, jnp.float32) for leaf in params.values())

        def start(leaves: Leaves) -> Leaves:
            return _copied(leaves, dtypes)

        def update(averages: Leaves, leaves: Leaves, weight: Any) -> tuple[Leaves, jax.Array]:
            engine.compiles.tracing("EMA.update", {"averages": f"{len(averages)} arrays"})
            moved = [a + weight * (leaf.astype(a.dtype) - a) for a, leaf in zip(averages, leaves, strict=True)]
            return engine.keep(moved, names), jnp.asarray(weight) + 0  # a result that nobody donates, to wait for

        # Copies: what the model holds is donated to its next update.
        self._averages: Leaves = self._run(jax.jit(start), tuple(params.values()))
        self._update = jax.jit(update, donate_argnums=0)
        self._cast = jax.jit(lambda averages, like: _copied(averages, [leaf.dtype for leaf in like]))

    def update(self, weight: float) -> None:
        """Dispatched, not waited for; the weight is an input of the program."""
        if not self.shapes:
            return
        self._model.source.settle(for_writing=False)
        self._averages, done = self._run(self._update, self._averages, self._leaves(), weight)
        self._engine.pace(done)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model gets copies: a program may be given its arrays to reuse their memory."""
        self._model.source.settle(for_writing=True)
        kept = self._leaves()
        self._assign(self._run(self._cast, self._averages, kept))
        try:
            yield
        finally:
            self._model.source.settle(for_writing=True)
            self._assign(kept)

    def read(self) -> dict[str, Any]:
        """On the host, whole: every process must call it."""
        with self._engine.reading_whole():
            read = self._engine.state_to_host
            return {name: np.array(read(a, name)) for name, a in zip(self.shapes, self._averages, strict=True)}

    def write(self, arrays: Mapping[str, Any]) -> None:
        """From the host."""
        pairs = zip(self.shapes, self._averages, strict=True)
        with self._engine.dtypes(self._model.wants_64bit):
            self._averages = tuple(
                self._engine.mesh.keep([np.array(arrays[name]).astype(old.dtype) for name, old in pairs], self._names)
            )

    def _run(self, function: Any, *args: Any) -> Any:
        with self._engine.dtypes(self._model.wants_64bit):
            return self._engine.compiles.run(function, *args)

    def _leaves(self) -> Leaves:
        leaves, positions = self._model.leaves, self._model.positions
        return tuple([leaves[positions[name]] for name in self.shapes])

    def _assign(self, values: Leaves) -> None:
        leaves, positions = list(self._model.leaves), self._model.positions
        for name, value in zip(self.shapes, values, strict=True):
            leaves[positions[name]] = value
        self._model.set_leaves(tuple(leaves))


def _copied(leaves: Any, dtypes: Any) -> Leaves:
    return tuple([jnp.copy(leaf.astype(dtype)) for leaf, dtype in zip(leaves, dtypes, strict=True)])
