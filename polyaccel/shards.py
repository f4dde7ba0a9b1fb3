"""The seam's part about state: pieces of global arrays, and what an engine reads and writes of everything that a run remembers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Shard:
    """A named piece of a global array: `data` is a host (numpy) array that starts at `offset` within `global_shape`.

    `dtype` is numpy's name, `bfloat16` or a float8 included: numpy has none of these, and `data` is then an array of ml_dtypes or
    one of the bits, as unsigned integers of that size.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    dtype: str
    data: Any


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape and numpy dtype name (`bfloat16` included) of one array."""

    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class HoldsPieces(Protocol):
    """An engine or bridge whose torch modules may hold pieces of their parameters: their own `state_dict` would give these."""

    def whole_state_dict(self, module: Any) -> dict[str, Any]:
        """`module.state_dict()` of a user's own module, with whole values. Every process must call it."""
        ...


class StatefulEngine(Protocol):
    """What an engine remembers. Reading changes nothing, and gives memory of its own: training goes on while it is written.

    Names are those of the dialect, the same on every engine: a model's parameters and buffers by their own names (what the
    dialect does not save is left out), tied ones once; an optimizer's state as `<parameter>.<slot>` with the names of its model,
    or as `model_<index>.<parameter>.<slot>` where it updates several.
    """

    def read_state(self, handle: Any) -> Iterator[Shard]:
        """Every global element of a model's or optimizer's state exactly once over all processes."""
        ...

    def check_state(self, handle: Any, specs: Mapping[str, ArraySpec]) -> None:
        """Raises CheckpointError where `write_state` of arrays of these names, global shapes and dtypes would; changes nothing."""
        ...

    def write_state(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Load shards of any mesh; every process gives all shards it needs. Raises CheckpointError before anything is changed."""
        ...

    def parameter_names(self, handle: Any) -> list[str] | None:
        """What an optimizer updates, by the names that its state is named with, in the order in which it was given them over all its
        parameter groups; None for one that knows no such order (optax)."""
        ...

    def read_gradients(self, handle: Any) -> Iterator[Shard]:
        """A model's accumulated gradients, free of any loss scale, every element once over all processes.

        Dim 0 is added to the parameter's shape: one entry per data shard where each has gradients of its own between updates, else
        one. Parameters without a gradient are left out.
        """
        ...

    def write_gradients(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Replace a model's gradients, without the added dim; parameters that are not given have none afterwards."""
        ...

    def read_scaler(self) -> dict[str, float | int] | None:
        """{"scale", "growth_tracker"} of dynamic loss scaling, None without one."""
        ...

    def write_scaler(self, state: Mapping[str, float | int]) -> None:
        """Continue with this loss scale."""
        ...

    def read_random(self) -> dict[str, Any]:
        """The generators that this process draws from on its devices: plain values and bytes, by the generator's name."""
        ...

    def write_random(self, state: Mapping[str, Any]) -> None:
        """Continue with what `read_random` gave on an engine that has the same generators."""
        ...
