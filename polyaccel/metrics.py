"""`gather_for_metrics`: the values of a batch on all processes, each real sample once, by the rows that the loader handed out with it."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyaccel import trees
from polyaccel.data import GlobalRows
from polyaccel.errors import UnsupportedError


@dataclasses.dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of the batch that is in use, seen from process `process` of `num_processes`.

    `rows` None: all are real and the processes hold as many of them. `is_left`: the batch is the last one of a loop that was
    left, and values that do not have its rows exactly are taken for those of several batches, and kept whole. Where several processes
    have the same batches, each is counted among those that have none in common: one of every `num_processes_per_shard`.
    """

    process: int
    num_processes: int
    rows: GlobalRows | None = None
    is_left: bool = False

    @property
    def present(self) -> tuple[int, ...]:
        """The processes that hold rows of this batch; the others have left the loop, and answer no call."""
        if self.rows is None or len(self.rows.held) != self.num_processes:
            return tuple(range(self.num_processes))
        return tuple([process for process, held in enumerate(self.rows.held) if held])

    def require_known(self) -> None:
        """Raises UnsupportedError where nobody knows which rows are real."""
        if self.rows is not None and self.rows.num_real < 0:
            raise UnsupportedError(
                "gather_for_metrics cannot know which samples of this batch are repetitions: with in_order=False the workers of the"
                " DataLoader may overtake each other, and any of the last batches may be the one that was completed",
                "leave in_order=False out of the loader for evaluation, or use accelerator.gather and your own rule",
            )

    def kept(self, size: int, process: int, whose: str) -> int:
        """How many of a value's `size` rows on a process belong to real samples; they come first. Raises UnsupportedError
        where a part of them does and it cannot be known which."""
        if self.rows is None:
            return size
        return self._kept(size, self.rows.held[process], self.rows.real(process), self.rows.full, whose)

    def kept_of_whole(self, size: int, whose: str) -> int:
        """The same for a value that has the rows of the whole global batch, on every process."""
        if self.rows is None:
            return size
        full = None if self.rows.full is None else self.rows.full * len(self.rows.held)
        return self._kept(size, sum(self.rows.held), self.rows.num_real, full, whose)

    def _kept(self, size: int, held: int, real: int, full: int | None, whose: str) -> int:
        if size in (held, full):  # a value that was repeated for each row of a whole batch stands for the real ones
            return real
        if self.is_left or real == held:
            return size
        if size % held == 0:  # several rows for each sample
            return size // held * real
        if size == 1:  # one value for the process
            return min(1, real)
        raise UnsupportedError(
            f"gather_for_metrics got {whose} of {size} rows for a batch of {held} samples, of which {real} are no repetition, and"
            " cannot know which rows to keep",
            "give every sample the same number of rows, or use accelerator.gather, gather_loader.remainder and your own rule",
        )

    @property
    def is_even(self) -> bool:
        """Whether all present processes hold as many rows."""
        return self.rows is None or len({held for held in self.rows.held if held}) == 1


def is_array(value: Any) -> bool:
    """True for an array of any framework."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def has_objects(tree: Any) -> bool:
    """Whether a tree has leaves that are no arrays."""
    return not all(is_array(leaf) for leaf in trees.flatten(tree)[0])


class _Cell:
    """A place in a tree that is filled with entry `index` of the arrays or of the columns. No dataclass: that is a container."""

    __slots__ = ("index", "is_array")

    def __init__(self, index: int, is_array: bool) -> None:
        self.index, self.is_array = index, is_array


class Columns:
    """The parts of a tree that travel: `arrays`, and `columns` of objects, one entry per sample. Its containers stay.

    A list in which something is no array is a column; so is a tuple of such values, but not one of lists, which are a column
    each. Any other value is a column of one entry. `as_objects`: arrays are columns of their rows, and a list is a column
    whatever it holds.
    """

    def __init__(self, tree: Any, *, as_objects: bool) -> None:
        self.arrays: list[Any] = []
        self.columns: list[list[Any]] = []
        self._as_objects = as_objects
        self._template = self._take(tree)

    def rebuilt(self, arrays: list[Any], columns: list[list[Any]]) -> Any:
        """The tree with these in place of its own."""
        return trees.map_leaves(lambda cell: (arrays if cell.is_array else columns)[cell.index], self._template)

    def _take(self, tree: Any) -> Any:
        if is_array(tree):
            if self._as_objects:
                return self._column(list(tree) if len(tree.shape) else [tree])
            self.arrays.append(tree)
            return _Cell(len(self.arrays) - 1, is_array=True)
        if self._is_column(tree):
            return self._column(list(tree))
        container = trees.opened(tree)
        if container is None:
            return self._column([tree])
        values, structure = container
        return structure.unflatten([self._take(value) for value in values])

    def _is_column(self, tree: Any) -> bool:
        if type(tree) is list:
            return not tree or self._as_objects or has_objects(tree)
        if type(tree) is not tuple:
            return False
        holds_columns = all(isinstance(item, list) for item in tree) or any(map(is_array, trees.flatten(tree)[0]))
        return self._as_objects or not holds_columns

    def _column(self, entries: list[Any]) -> _Cell:
        self.columns.append(entries)
        return _Cell(len(self.columns) - 1, is_array=False)
