"""Iterables of batches, grain's loaders and datasets among them, cut over data shards: every process reads all and keeps its part."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any

import numpy as np

from polyaccel import wire
from polyaccel.data import DataSharding, GlobalRows
from polyaccel.errors import PrepareError
from polyaccel_jax.dialect.batch_trees import Leaves, Structure, carries, flatten, num_samples


class HostIterable:
    """HostBatches of an iterable that yields batches; see `polyaccel.data.HostBatches`.

    Without `split_batches` a batch is one data shard's and `num_shards` of them are a global batch; with it a batch is the
    global batch and is cut. The size of the first batch is the size that a short one is completed to. Where the iterable's
    iterator has `get_state` and `set_state`, as grain's have, a pass that is continued goes on from there and skips nothing.
    """

    def __init__(self, loader: Iterable[Any], sharding: DataSharding) -> None:
        if not hasattr(loader, "__iter__"):
            raise PrepareError(
                f"a {type(loader).__name__} cannot be iterated over",
                "pass an iterable of batches: trees of numpy arrays",
            )
        self.loader = loader
        self.sharding = sharding
        self.batch_size: int | None = None  # known from the first batch on
        self.seed: int | None = None
        self._states: deque[Any] = deque()  # of the batches that were read and not handed out
        self._latest: Any = None
        self._resume: Any = None
        self._was_read = False

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a full global batch; None before the first batch was read."""
        return self.sharding.total_batch_size(self.batch_size)

    @property
    def even_batches(self) -> bool:
        """Whether the last global batch is completed; may be changed between passes."""
        return self.sharding.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.sharding = replace(self.sharding, even_batches=value)

    @property
    def _group(self) -> int:
        return 1 if self.sharding.split_batches else self.sharding.num_shards

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return -(-len(self.loader) // self._group)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the loader, if it takes one."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    # -- an iterator that knows where it stands ------------------------------------------------------------------------

    knows_position = True

    def hand_out(self) -> None:
        """The next batch that was read is in use now."""
        self._latest = self._states.popleft()

    def source_state(self) -> bytes | None:
        """The iterator's own state after the latest batch that was handed out; None where it has none."""
        return None if self._latest is None else wire.encode(self._latest)

    def resume_source(self, state: bytes, num_batches: int) -> None:
        """Let the next pass go on from a state that `source_state` gave."""
        self._resume = wire.decode(state)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from global batch `skip` on: (this process's part, its GlobalRows or None)."""
        self._states.clear()
        self._latest, resume, self._resume = None, self._resume, None
        stream = iter(self.loader)
        if stream is self.loader and self._was_read:
            raise PrepareError(
                f"a {type(stream).__name__} gives its batches once, and this is the second pass over it",
                "pass an object whose __iter__ begins anew: a list, a class with __iter__, a grain loader",
            )
        self._was_read = True
        if resume is not None and hasattr(stream, "set_state"):
            stream.set_state(resume)
            return self._pass(stream, 0, is_from_start=False)
        return self._pass(stream, skip, is_from_start=True)

    def _pass(
        self, stream: Iterator[Any], skip: int, *, is_from_start: bool
    ) -> Iterator[tuple[Any, GlobalRows | None]]:
        first: _GlobalBatch | None = None
        read_state = getattr(stream, "get_state", None)
        for number, group in enumerate(_groups(stream, self._group)):
            whole = _GlobalBatch(group)
            if number == 0 and is_from_start:
                first = whole
                self._learn_size(whole)
            if number < skip:
                continue
            if first is None and self._must_complete(whole):  # a pass that was continued began elsewhere
                beginning = iter(self.loader)
                first = _GlobalBatch(next(_groups(beginning, self._group)))
            part = self._part(whole, first)
            if part is not None:
                self._states.append(None if read_state is None else read_state())
                yield part

    def _learn_size(self, whole: _GlobalBatch) -> None:
        self.batch_size = whole.sizes[0]
        self.sharding.check(self.batch_size)

    def _must_complete(self, whole: _GlobalBatch) -> bool:
        total = self.total_batch_size
        return total is not None and whole.size < total and self.sharding.even_batches and self.sharding.num_shards > 1

    def _part(self, whole: _GlobalBatch, first: _GlobalBatch | None) -> tuple[Any, GlobalRows | None] | None:
        """This process's part of a global batch, completed from the first one if it is short; None where it has none."""
        cut = self.sharding
        if self.batch_size is None:  # continued from a state that says nothing about it
            self._learn_size(whole)
        total = self.total_batch_size or 0
        is_whole = whole.size == total and len(set(whole.sizes)) == 1
        if is_whole and cut.num_local_shards == cut.num_shards and len(whole.batches) == 1:
            return whole.batches[0], None
        leaves, size = whole.joined(), whole.size
        if first is not None and self._must_complete(whole):
            leaves, size = _completed(leaves, first.joined(), size, total), total
        part = total // cut.num_shards
        if size > total:  # batches of changing sizes
            part = -(-size // cut.num_shards)
        sizes = [max(0, min(part, size - shard * part)) for shard in range(cut.num_shards)]
        start, stop = cut.first_shard * part, (cut.first_shard + cut.num_local_shards) * part
        if start >= size:
            return None
        local = [leaf[start : min(stop, size)] if carries(leaf, size) else leaf for leaf in leaves]
        return whole.structure.unflatten(local), cut.rows(sizes, whole.size, self.batch_size)


class _GlobalBatch:
    """The batches of one global batch, as the iterable gave them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        flat = [flatten(batch) for batch in batches]
        self.leaves = [leaves for leaves, _ in flat]
        self.structure: Structure = flat[0][1]
        self.sizes = [num_samples(leaves) for leaves in self.leaves]
        self.size = sum(self.sizes)
        for _, structure in flat[1:]:
            if structure != self.structure:
                raise PrepareError(
                    "two batches of one global batch have different containers or entries",
                    "let every batch of the loader have the same structure",
                )

    def joined(self) -> Leaves:
        """The leaves of all of them as one batch: those with a row per sample one after the other, others as in the first."""
        if len(self.batches) == 1:
            return self.leaves[0]
        columns = list(zip(*self.leaves, strict=True))
        return [self._joined(column) for column in columns]

    def _joined(self, column: tuple[Any, ...]) -> Any:
        if not all(carries(leaf, size) for leaf, size in zip(column, self.sizes, strict=True)):
            return column[0]
        if isinstance(column[0], list):
            return list(itertools.chain.from_iterable(column))
        return np.concatenate([np.asarray(leaf) for leaf in column])


def _groups(stream: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(itertools.islice(stream, size)):
        yield group


def _completed(leaves: Leaves, first: Leaves, size: int, total: int) -> Leaves:
    """`leaves` of `size` samples, filled up to `total` by going through the first global batch, as often as needed."""

    def one(leaf: Any, beginning: Any) -> Any:
        if not carries(leaf, size):
            return leaf
        if isinstance(leaf, list):
            return [*leaf, *itertools.islice(itertools.cycle(beginning), total - size)]
        rows = np.arange(total - size) % beginning.shape[0]
        return np.concatenate([np.asarray(leaf), np.asarray(beginning)[rows]])

    return [one(leaf, beginning) for leaf, beginning in zip(leaves, first, strict=True)]
