"""Several models as one, for an optimizer that trains parameters of all of them: one update program, one loss-scaling decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp

from polyaccel_jax.handles import JaxModel


@final
class JointModel:
    """What an optimizer needs of a model; parameter names are `<model>.<name>`. It holds no array of its own."""

    def __init__(self, models: Sequence[JaxModel]) -> None:
        self.models = tuple(models)
        self.engine: Any = models[0].engine
        self.name = " and ".join(model.name for model in models)
        self.names: tuple[str, ...] = tuple(f"{model.name}.{name}" for model in models for name in model.names)
        self.positions = {name: index for index, name in enumerate(self.names)}
        self.wants_64bit = any(model.wants_64bit for model in models)

    def full(self, name: str) -> str:
        """The name of one of its parameters in programs and on the mesh: what it is here."""
        return name

    @property
    def params(self) -> dict[str, jax.Array]:
        """The parameters of all models; valid until the next update."""
        return {f"{model.name}.{name}": leaf for model in self.models for name, leaf in model.params.items()}

    @property
    def leaves(self) -> tuple[jax.Array, ...]:
        """The parameters in the order of `names`."""
        return tuple([leaf for model in self.models for leaf in model.leaves])

    @property
    def gradients(self) -> dict[str, jax.Array]:
        """The gradients of all models."""
        return {f"{model.name}.{name}": grad for model in self.models for name, grad in model.gradients.items()}

    def set_gradients(self, values: Mapping[str, jax.Array]) -> None:
        """Replace the gradients of these parameters."""
        for model, names in self._by_model(values):
            model.gradients.update({name: values[f"{model.name}.{name}"] for name in names})

    @property
    def overflow(self) -> jax.Array | None:
        """fp16: whether the gradients of all models were finite, where one of them noted it."""
        noted = [model.overflow for model in self.models if model.overflow is not None]
        return jnp.stack(noted).all() if noted else None

    @overflow.setter
    def overflow(self, value: jax.Array | None) -> None:
        for model in self.models:
            model.overflow = value

    def set_leaves(self, leaves: tuple[jax.Array, ...]) -> None:
        """Hand every model its new parameters."""
        start = 0
        for model in self.models:
            end = start + len(model.names)
            model.set_leaves(leaves[start:end])
            start = end

    def zero_grad(self, names: Sequence[str]) -> None:
        """Drop the gradients of these parameters."""
        for model, own in self._by_model(names):
            model.zero_grad(own)

    def _by_model(self, names: Any) -> list[tuple[JaxModel, list[str]]]:
        wanted = set(names)
        return [(model, [n for n in model.names if f"{model.name}.{n}" in wanted]) for model in self.models]
