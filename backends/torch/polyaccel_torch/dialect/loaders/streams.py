"""Iterable datasets cut over data shards where they run, in workers too; any iterable of whole batches as such a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset

from polyaccel import trees
from polyaccel.data import DataSharding, GlobalRows, IterableShard
from polyaccel.errors import PrepareError, UnsupportedError


class Stream(IterableDataset[Any]):
    """Any iterable as a dataset."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the iterable, if it takes one."""
        if hasattr(self.iterable, "set_epoch"):
            self.iterable.set_epoch(epoch)


class SizedStream(Stream):
    """An iterable with a length."""

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]


def stream_of(iterable: Iterable[Any]) -> Stream:
    """The iterable as a dataset, with a length if it has one. Raises PrepareError for what cannot be iterated over."""
    if not hasattr(iterable, "__iter__"):
        raise PrepareError(
            f"a {type(iterable).__name__} cannot be iterated over", "pass a DataLoader, or an iterable of batches"
        )
    return SizedStream(iterable) if isinstance(iterable, Sized) else Stream(iterable)


class ShardedStream(IterableDataset[Any]):
    """Yields (collated batch of this process, rows). With `deals_out`, (the batches of all processes, rows)."""

    def __init__(
        self,
        dataset: Any,
        sharding: DataSharding,
        batch_size: int | None,
        drop_last: bool,
        collate: Callable[[list[Any]], Any],
        *,
        deals_out: bool = False,
    ) -> None:
        self._dataset = dataset
        self._sharding = sharding
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._collate = collate
        self._deals_out = deals_out

    def __iter__(self) -> Iterator[tuple[Any, GlobalRows | None]]:
        shard = IterableShard(
            self._dataset,
            self._sharding,
            batch_size=self._batch_size,
            drop_last=self._drop_last,
            deals_out=self._deals_out,
        )
        for samples, rows in shard:
            yield [self._collate(part) for part in samples] if self._deals_out else self._collate(samples), rows


class Whole:
    """Makes this process's batch from elements that are batches: joins those of its shards, or cuts one by `split_batches`."""

    def __init__(self, convert: Callable[[Any], Any], sharding: DataSharding) -> None:
        self._convert = convert
        self._sharding = sharding

    def __call__(self, elements: list[Any]) -> Any:
        batches = [self._convert(element) for element in elements]
        cut = self._sharding
        if cut.split_batches:
            return slice_of(batches[0], cut, cut.first_shard, cut.num_local_shards)
        return join(batches)


class Parts(list[Any]):
    """The parts of one batch that was cut, one for each process."""


def slice_of(batch: Any, sharding: DataSharding, first_shard: int, num_shards: int) -> Any:
    """The rows of `num_shards` shards of a global batch, from `first_shard` on. Raises PrepareError where they are not equal."""

    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not len(leaf.shape):
            return leaf
        if leaf.shape[0] % sharding.num_shards:
            raise PrepareError(
                f"split_batches=True cuts a batch of {leaf.shape[0]} samples over {sharding.num_shards} data shards, and they"
                " would not be equal",
                f"let the dataset give batches of a multiple of {sharding.num_shards} samples",
            )
        part = leaf.shape[0] // sharding.num_shards
        return leaf[first_shard * part : (first_shard + num_shards) * part]

    return trees.map_leaves(one, batch)


def join(batches: list[Any]) -> Any:
    """Batches of one structure as one: every array concatenated along dim 0. Raises UnsupportedError where that cannot be."""
    return batches[0] if len(batches) == 1 else trees.map_leaves(lambda *parts: _join(parts), *batches)


def _join(parts: tuple[Any, ...]) -> Any:
    first = parts[0]
    shapes = {tuple(part.shape[1:]) for part in parts if hasattr(part, "shape")}
    if len(shapes) > 1:
        raise PrepareError(
            "batches of several data shards cannot be joined: their samples have the shapes"
            f" {', '.join(map(str, sorted(shapes)))}",
            "let the dataset yield samples and give the DataLoader a batch_size: collate_fn then makes one batch of them",
        )
    if isinstance(first, torch.Tensor) and first.dim():
        return torch.cat(parts)
    if hasattr(first, "shape") and len(first.shape):
        import numpy as np

        return np.concatenate(parts)
    if not hasattr(first, "shape") and all(part == first for part in parts[1:]):
        return first  # a value that every batch carries
    raise UnsupportedError(
        f"batches of several data shards cannot be joined: they hold a {type(first).__name__} without a batch dimension",
        "give the DataLoader a batch_size and let the dataset yield samples",
    )


def as_it_is(batch: Any) -> Any:
    """What is collated already."""
    return batch
