"""What one process reads of a batch sampler or of a stream, as torch's own kinds of objects: scripts build them for themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from polyaccel.data import DataSharding, IterableShard, ShardedBatchSampler


class BatchSamplerShard(BatchSampler):
    """The batches of one process: batches i, i + n, ... of `batch_sampler`, or with `split_batches` the i-th slice of every batch.

    With `even_batches` every process gets as many batches of the same size: the last ones are completed from the first samples.
    Raises a ValueError for batches that cannot be split evenly.
    """

    def __init__(
        self,
        batch_sampler: BatchSampler,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.sharding = DataSharding(num_processes, process_index, 1, split_batches, even_batches)
        self._shard = ShardedBatchSampler(batch_sampler, self.sharding)
        self.split_batches = split_batches
        self.batch_size = self._shard.batch_size  # type: ignore[assignment]
        self.drop_last = self._shard.drop_last

    @property
    def even_batches(self) -> bool:
        """Whether the last batches are completed; may be set."""
        return self._shard.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._shard.even_batches = value

    @property
    def total_length(self) -> int:
        """Batches of all processes together."""
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Reaches the batch sampler and its sampler."""
        self._shard.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._shard)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._shard)


class IterableDatasetShard(IterableDataset[Any]):
    """The samples of one process: of every `batch_size * num_processes` samples (`batch_size`, with `split_batches`) its part.

    The last ones are completed from the first, or left out with `drop_last`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        cut = DataSharding(num_processes, process_index, 1, split_batches)
        self._shard = IterableShard(dataset, cut, batch_size=batch_size, drop_last=drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Reaches the dataset."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._shard) * (self.batch_size // self.num_processes if self.split_batches else self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for samples, _ in self._shard:
            yield from samples


class SkipBatchSampler(BatchSampler):
    """A batch sampler without the first `skip_batches` batches; everything else is that of `batch_sampler`."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    @property
    def total_length(self) -> int:
        """Batches, with those that are left out."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        for index, batch in enumerate(self.batch_sampler):
            if index >= self.skip_batches:
                yield batch

    def __len__(self) -> int:
        return max(len(self.batch_sampler) - self.skip_batches, 0)


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """The sampler that chooses a loader's samples."""
    batch_sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    return getattr(batch_sampler, "sampler", None)


def is_stream(dataloader: DataLoader[Any]) -> bool:
    """Whether a loader reads an iterable dataset, of which nothing can be left out by choosing indices."""
    return isinstance(dataloader.dataset, IterableDataset)


def without_first_batches(dataloader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    """A copy of a loader that is no stream, whose batch sampler leaves out the first batches."""
    skipping = copy.copy(dataloader)
    attribute = "sampler" if isinstance(dataloader.sampler, BatchSampler) else "batch_sampler"
    # A DataLoader forbids the assignment because its own iterators may be running; the copy has none.
    vars(skipping)[attribute] = SkipBatchSampler(getattr(dataloader, attribute), num_batches)
    vars(skipping)["_iterator"] = None
    return skipping
