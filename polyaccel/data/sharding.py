"""Cuts a stream of samples over data shards, with the arithmetic of Hugging Face Accelerate; pure functions of the order.

A *global batch* is what all data shards together see in one step. Every process walks the whole stream of indices and keeps its
own part, so no process needs to ask another, and each knows how many samples of a global batch are real.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

from polyaccel import trees
from polyaccel.errors import PrepareError


@dataclass(frozen=True, slots=True)
class GlobalRows:
    """Which rows of a global batch are real samples, where not all of them are, or where the processes hold different numbers.

    `held[i]` rows are process i's part; over all parts, in process order, the first `num_real` rows are real and the others repeat
    samples. `full` is a part of a whole global batch, None where sizes change. Every process knows all of it, without asking others.
    """

    held: tuple[int, ...]
    num_real: int
    full: int | None = None

    def real(self, process: int) -> int:
        """The real ones of a process's rows; they come first."""
        return max(0, min(self.held[process], self.num_real - sum(self.held[:process])))


UNKNOWN_ROWS = GlobalRows((), -1)  # some may repeat samples, and nobody knows which


@dataclass(frozen=True, slots=True)
class DataSharding:
    """The part of every global batch that one process reads: data shards `first_shard .. first_shard + num_local_shards`.

    `split_batches`: a loader's batch is the global batch and is cut; otherwise it is one shard's, and `num_shards` of them make
    a global batch. `even_batches`: the last global batch is completed by starting again from the first samples, so that all
    shards have the same number and size of batches.
    """

    num_shards: int = 1
    first_shard: int = 0
    num_local_shards: int = 1
    split_batches: bool = False
    even_batches: bool = True

    def local(self, shards: Sequence[Any]) -> Sequence[Any]:
        """The entries of this process's shards."""
        return shards[self.first_shard : self.first_shard + self.num_local_shards]

    def total_batch_size(self, batch_size: int | None) -> int | None:
        """Samples in a full global batch, for a loader of this batch size."""
        if batch_size is None:
            return None
        return batch_size if self.split_batches else batch_size * self.num_shards

    def rows(self, sizes: Sequence[int], num_real: int, batch_size: int | None) -> GlobalRows | None:
        """The rows of a global batch whose shards hold `sizes` rows; None where all are real and every process holds as many."""
        local = self.num_local_shards
        held = tuple([sum(sizes[first : first + local]) for first in range(0, self.num_shards, local)])
        total = self.total_batch_size(batch_size)
        full = None if total is None else total // self.num_shards * local
        if sum(held) == num_real and len(set(held)) == 1 and full in (None, held[0]):
            return None
        return GlobalRows(held, num_real, full)

    def check(self, batch_size: int | None) -> None:
        """Raises PrepareError, naming both numbers, when a global batch of this size cannot be cut into equal parts."""
        if self.split_batches and self.num_shards > 1 and (batch_size is None or batch_size % self.num_shards):
            raise PrepareError(
                f"split_batches=True cuts a batch of batch_size={batch_size} over {self.num_shards} data shards,"
                " and they would not be equal",
                f"use a batch_size that is a round multiple of {self.num_shards}, or split_batches=False",
            )


class ShardedBatchSampler:
    """Wraps a batch sampler: yields, per global batch, the indices of this process's shards, concatenated in shard order.

    Without `split_batches`, shard i takes batches i, i + n, i + 2n, ...; with it, the i-th slice of every batch. With one shard
    every batch passes through as it is. A batch sampler without `batch_size` may yield batches of any size: its last global
    batch is completed with whole batches.

    `on_start` is called at the start of each pass, right before the first index is drawn: processes agree on the order there.
    `rows` belongs to the latest pass: for each batch taken so far and not yet popped, the GlobalRows of its global batch, or None.

    With `deals_out` the indices of every process come one after the other, for a process that reads for all; `counts` then goes
    with `rows`: how many of them make up the global batch.
    """

    def __init__(
        self,
        batch_sampler: Iterable[Any],
        sharding: DataSharding,
        *,
        on_start: Callable[[], None] | None = None,
        deals_out: bool = False,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.sharding = sharding
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)
        self.drop_last: bool = getattr(batch_sampler, "drop_last", False)
        self.rows: deque[GlobalRows | None] = deque()
        self.counts: deque[int] = deque()
        self._deals_out = deals_out
        self._on_start = on_start
        self._skip = 0
        sharding.check(self.batch_size)

    @property
    def sampler(self) -> Any:
        """The sampler inside the batch sampler, if it has one."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def even_batches(self) -> bool:
        """Whether the last global batch is completed; may be set between passes."""
        return self.sharding.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.sharding = replace(self.sharding, even_batches=value)

    @property
    def split_batches(self) -> bool:
        """Whether a batch of the batch sampler is the global batch."""
        return self.sharding.split_batches

    def skip_next(self, num_batches: int) -> None:
        """Leave out the first `num_batches` global batches of the next pass; their samples are not read."""
        self._skip = num_batches

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the batch sampler and to its sampler, if they take one."""
        for part in (self.batch_sampler, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        if not isinstance(self.batch_sampler, Sized):
            raise TypeError(f"{type(self.batch_sampler).__name__} has no length")
        num_batches, cut = len(self.batch_sampler), self.sharding
        if cut.split_batches or cut.num_shards == 1:
            return num_batches - self._missing_split_tail()
        full, rest = divmod(num_batches, cut.num_shards)
        if not rest or self.drop_last:
            return full
        return full + (cut.even_batches or cut.first_shard < rest)

    def _missing_split_tail(self) -> int:
        """1 if the short last batch, cut without completing it, leaves nothing for this process."""
        cut = self.sharding
        if cut.even_batches or self.drop_last or cut.num_shards == 1 or not self.batch_size:
            return 0
        if not isinstance(self.sampler, Sized):
            return 0
        tail = len(self.sampler) % self.batch_size
        return int(0 < tail <= cut.first_shard * (self.batch_size // cut.num_shards))

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: whoever called iter() finds the queue of exactly this pass in `rows`.
        self.rows, self.counts = deque(), deque()
        return self._pass(self.rows, self.counts)

    def _pass(self, rows: deque[GlobalRows | None], counts: deque[int]) -> Iterator[Any]:
        # Taken when the pass really starts: a DataLoader with workers calls iter() twice and uses the second.
        skip, self._skip = self._skip, 0
        if self._on_start is not None:
            self._on_start()
        cut = self.sharding
        if cut.num_shards == 1:
            for batch in itertools.islice(self.batch_sampler, skip, None):
                size = len(batch)
                is_whole = self.batch_size is None or size == self.batch_size
                rows.append(None if is_whole else GlobalRows((size,), size, self.batch_size))
                if self._deals_out:
                    counts.append(1)
                yield batch
            return
        cut_batches = _split if cut.split_batches else _deal
        global_batches = cut_batches(self.batch_sampler, cut, self.batch_size, self.drop_last)
        for shards, num_real in itertools.islice(global_batches, skip, None):
            if self._deals_out:
                local = cut.num_local_shards
                parts = [shards[first : first + local] for first in range(0, cut.num_shards, local)]
                filled = [part for one in parts if (part := list(itertools.chain.from_iterable(one)))]
                rows.append(cut.rows([len(shard) for shard in shards], num_real, self.batch_size))
                counts.append(len(filled))
                yield from filled
                continue
            indices = list(itertools.chain.from_iterable(cut.local(shards)))
            if indices:
                rows.append(cut.rows([len(shard) for shard in shards], num_real, self.batch_size))
                yield indices


class IterableShard:
    """The same cut for a stream of samples without indices: yields (samples of this process's shards, rows) per step.

    `batch_size` None: the elements of the stream are batches already, and a global batch is `num_shards` of them. The stream is
    read in full by every process, so all must read the same one. `rows` is the GlobalRows of the global batch, or None, as in
    `ShardedBatchSampler.rows`. With `deals_out`, (a list of the samples of each process, rows), for a process that reads for all.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        sharding: DataSharding,
        *,
        batch_size: int | None,
        drop_last: bool = False,
        deals_out: bool = False,
    ) -> None:
        if batch_size is not None:
            sharding.check(batch_size)
        self.iterable = iterable
        self.sharding = sharding
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._deals_out = deals_out

    @property
    def _chunk(self) -> int:
        return self.sharding.total_batch_size(self.batch_size or 1) or 1

    def __len__(self) -> int:
        if not isinstance(self.iterable, Sized):
            raise TypeError(f"{type(self.iterable).__name__} has no length")
        full, rest = divmod(len(self.iterable), self._chunk)
        if not rest or self.drop_last:
            return full
        cut = self.sharding
        part = self._chunk // cut.num_shards
        return full + (cut.even_batches or cut.num_shards == 1 or cut.first_shard * part < rest)

    def __iter__(self) -> Iterator[tuple[list[Any], GlobalRows | None]]:
        cut, size = self.sharding, self._chunk
        part = size // cut.num_shards
        span = slice(cut.first_shard * part, (cut.first_shard + cut.num_local_shards) * part)
        stream = iter(self.iterable)
        first: list[Any] | None = None
        while chunk := list(itertools.islice(stream, size)):
            num_real = len(chunk)
            if first is None:
                first = chunk
            if num_real < size:
                if self.drop_last:
                    return
                if cut.even_batches and cut.num_shards > 1:
                    chunk = _completed(chunk, first, size)
            if self._deals_out:
                held = part * cut.num_local_shards
                parts = [chunk[first : first + held] for first in range(0, len(chunk), held)]
                yield parts, self._rows(chunk, num_real, part)
            elif local := chunk[span]:
                yield local, self._rows(chunk, num_real, part)

    def _rows(self, chunk: list[Any], num_real: int, part: int) -> GlobalRows | None:
        cut = self.sharding
        if self.batch_size is not None:
            sizes = [max(0, min(part, len(chunk) - first)) for first in range(0, cut.num_shards * part, part)]
            return cut.rows(sizes, num_real, self.batch_size)
        counts = [num_rows(element) for element in chunk]
        counted = [*counts, *([0] * (cut.num_shards - len(counts)))]
        return cut.rows(counted, sum(counts[:num_real]), None)


def num_rows(batch: Any) -> int:
    """Samples in a batch: dim 0 of its first array that has one, else the length of its first list; 1 for a lone value."""
    for leaf in trees.flatten(batch)[0]:
        shape: Any = getattr(leaf, "shape", ())
        if len(shape):
            return int(shape[0])
    while isinstance(batch, Mapping) and batch:
        batch = next(iter(batch.values()))
    return len(batch) if isinstance(batch, (list, tuple)) else 1


def _deal(
    batches: Iterable[Sequence[int]], cut: DataSharding, batch_size: int | None, drop_last: bool
) -> Iterator[tuple[list[Sequence[int]], int]]:
    """Every `num_shards` consecutive batches are a global batch, one for each shard."""
    num_shards = cut.num_shards
    stream = iter(batches)
    first: list[Sequence[int]] | None = None
    while group := [list(batch) for batch in itertools.islice(stream, num_shards)]:
        if first is None:
            first = list(group)
        is_whole = len(group) == num_shards and (batch_size is None or len(group[-1]) == batch_size)
        num_real = sum(map(len, group))
        if is_whole:
            yield group, num_real  # type: ignore[misc]
            continue
        if drop_last:
            return
        if not cut.even_batches:
            yield [*group, *([] for _ in range(num_shards - len(group)))], num_real
        elif batch_size is None:
            yield [*group, *itertools.islice(itertools.cycle(first), num_shards - len(group))], num_real
        else:
            samples = list(itertools.chain.from_iterable(group))
            beginning = list(itertools.chain.from_iterable(first))
            samples = _completed(samples, beginning, num_shards * batch_size)
            yield [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)], num_real


def _split(
    batches: Iterable[Sequence[int]], cut: DataSharding, batch_size: int | None, drop_last: bool
) -> Iterator[tuple[list[Sequence[int]], int]]:
    """Every batch is a global batch, cut into `num_shards` slices."""
    assert batch_size is not None  # DataSharding.check has refused it
    part = batch_size // cut.num_shards
    first: Sequence[int] | None = None
    for batch in batches:
        if first is None:
            first = list(batch)
        num_real = len(batch)
        if num_real < batch_size:
            if drop_last:
                continue
            if cut.even_batches:
                batch = _completed(list(batch), list(first), batch_size)
        yield [batch[i : i + part] for i in range(0, batch_size, part)], num_real


def _completed(samples: list[Any], beginning: list[Any], size: int) -> list[Any]:
    """`samples`, filled up to `size` by going through `beginning` from its start, as often as needed."""
    return samples + list(itertools.islice(itertools.cycle(beginning), size - len(samples)))
