"""A value whose dims may follow batch and sequence, and of which one dim may in truth be two: (batch, length) under one name."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

BATCH, LENGTH, KEYS = "batch", "length", "keys"  # keys: follows the sequence, and is whole because another dim is cut

Labels = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """`value` has one label (or None) per dim. Where `at` is a dim, it and the one behind it are a single dim for the program."""

    value: Any
    labels: Labels
    at: int | None = None

    @classmethod
    def plain(cls, value: Any) -> Split:
        """A value of which nothing is known."""
        return cls(value, (None,) * np.ndim(value))

    @property
    def is_labelled(self) -> bool:
        """Whether any dim follows batch or sequence."""
        return self.at is not None or any(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The program's shape."""
        own = tuple(np.shape(self.value))
        if self.at is None:
            return own
        return (*own[: self.at], own[self.at] * own[self.at + 1], *own[self.at + 2 :])

    @property
    def shape_of_dims(self) -> tuple[Any, ...]:
        """What two values must have in common to be each other's alternative."""
        return (tuple(np.shape(self.value)), self.at)

    @property
    def pair(self) -> tuple[int, int] | None:
        """The sizes of the two dims that are one."""
        if self.at is None:
            return None
        own = np.shape(self.value)
        return own[self.at], own[self.at + 1]

    def merged_value(self) -> Any:
        """The value as the program has it."""
        return self.value if self.at is None else self.value.reshape(self.shape)

    def merged(self) -> Split:
        """The same without a dim that is two. It follows the batch alone from here on."""
        if self.at is None:
            return self
        outer = BATCH if self.labels[self.at] == BATCH else None
        return Split(self.merged_value(), (*self.labels[: self.at], outer, *self.labels[self.at + 2 :]))

    def parted(self, dim: int, pair: tuple[int, int]) -> Split | None:
        """The same with the program's dim `dim` as two of these sizes; None where another dim is two already."""
        if self.at is not None:
            return self if (self.at, self.pair) == (dim, pair) else None
        own = np.shape(self.value)
        assert own[dim] == prod(pair)
        value = self.value.reshape(*own[:dim], *pair, *own[dim + 1 :])
        return Split(value, (*self.labels[:dim], None, None, *self.labels[dim + 1 :]), dim)

    def own_dims(self, dim: int) -> tuple[int, ...]:
        """The dims of `value` that are the program's dim `dim`."""
        if self.at is None or dim < self.at:
            return (dim,)
        return (dim, dim + 1) if dim == self.at else (dim + 1,)

    def own(self, dims: Any) -> tuple[int, ...]:
        """The same for several dims, in their order."""
        return tuple(own for dim in dims for own in self.own_dims(dim))
