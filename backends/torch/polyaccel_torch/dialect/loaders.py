"""Cuts a torch DataLoader over data shards and leaves everything else of it as it was: sampler, collate function, workers, pinning.

The copy shares the user's objects; only the batch sampler (or the iterable dataset) is wrapped. In one process the order is
drawn from the same generators at the same moments as in a hand-written loop.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from polyaccel import trees
from polyaccel.data import DataSharding, GlobalRows, IterableShard, ShardedBatchSampler, refuse_prepared
from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError
from polyaccel_torch.dialect.worker_signals import outliving

Synchronize = Callable[[Any], Any]  # this process's value in, process 0's value out; every process calls it
RNG_TYPES = frozenset({"generator", "torch", "numpy", "python", "cuda"})


class TorchHostLoader:
    """A DataLoader that can be cut. `loader` is the user's own and is not changed.

    Any other iterable is taken for one that gives whole batches; their numpy arrays become tensors, as in a DataLoader.
    Raises PrepareError for a loader that is cut already, by a DistributedSampler or by an earlier prepare.
    """

    def __init__(self, loader: DataLoader[Any] | Iterable[Any]) -> None:
        refuse_prepared(loader)
        if not isinstance(loader, DataLoader):
            loader = DataLoader(_sized_stream(loader), batch_size=None)
        for sampler in (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler):
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
                raise PrepareError(
                    f"this DataLoader has a DistributedSampler over {sampler.num_replicas} replicas: cutting its batches again"
                    " would lose samples",
                    "leave the sampler out (shuffle=True shuffles over all processes); prepare cuts the batches",
                )
        self.loader = loader

    def shard(
        self,
        sharding: DataSharding,
        *,
        synchronize: Synchronize | None = None,
        rng_types: tuple[str, ...] = ("generator",),
    ) -> TorchHostBatches:
        """This process's part of every global batch, as host batches.

        `synchronize` makes all processes use process 0's random order, and must be given when there are several; `rng_types`
        says which generators it covers ("generator": the sampler's own). Raises PrepareError or UnsupportedError.
        """
        return TorchHostBatches(self.loader, sharding, _RandomOrder(synchronize, rng_types))


class TorchHostBatches:
    """A DataLoader's batches for one process; see `polyaccel.data.HostBatches`."""

    def __init__(self, loader: DataLoader[Any], sharding: DataSharding, order: _RandomOrder) -> None:
        self.loader = loader
        self.batch_size = _batch_size(loader)
        self.total_batch_size = sharding.total_batch_size(self.batch_size)
        self._order = order
        self._source = copy.copy(loader)  # keeps a subclass, its options and those of future torch versions
        self._source._iterator = None  # persistent workers belong to one loader
        self._sampler: ShardedBatchSampler | None = None
        self._length: Sized | None = None
        self._carries_rows = False
        if isinstance(loader.dataset, IterableDataset):
            self._cut_stream(sharding)
        else:
            self._cut_indices(sharding)

    @property
    def seed(self) -> int | None:
        """The seed of the current pass's order, if the default random sampler drew one."""
        return self._order.seed

    def read_generators(self) -> tuple[bytes, ...]:
        """The states of the generators that the user gave to the loader, its sampler or its dataset."""
        return tuple([generator.get_state().numpy().tobytes() for generator in self._generators()])

    def write_generators(self, states: tuple[bytes, ...]) -> None:
        """Continue from states that `read_generators` gave. Raises CheckpointError for another number of generators."""
        held = self._generators()
        if len(held) != len(states):
            raise CheckpointError(
                f"the loader was saved with {len(states)} random generators of its own and has {len(held)}",
                "build the DataLoader and its sampler with the generators that it was saved with",
            )
        for generator, state in zip(held, states, strict=True):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def _generators(self) -> list[torch.Generator]:
        given = (self._order.own, self.loader.generator)
        return list({id(one): one for one in given if isinstance(one, torch.Generator)}.values())

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"a {type(self.loader.dataset).__name__} without __len__ has no number of batches")
        return len(self._length)

    def set_epoch(self, epoch: int) -> None:
        """Reaches batch sampler, sampler and dataset, where they have `set_epoch`."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        if hasattr(self.loader.dataset, "set_epoch"):
            self.loader.dataset.set_epoch(epoch)

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from batch `skip` on; see `HostBatches.read`."""
        if self._source.num_workers:
            self._source.worker_init_fn = outliving(self.loader.worker_init_fn)
        self._order.seed, self._order.replay = None, seed
        if self._sampler is not None:
            self._sampler.skip_next(skip)
            batches = iter(self._source)
            return self._with_rows(batches, self._sampler.rows)
        self._order.draw()
        stream = iter(self._source)
        for _ in range(skip):  # a stream can only be skipped by reading it
            if next(stream, None) is None:
                break
        return (tuple(item) for item in stream) if self._carries_rows else ((batch, None) for batch in stream)

    def _with_rows(
        self, batches: Iterator[Any], rows: deque[GlobalRows | None]
    ) -> Iterator[tuple[Any, GlobalRows | None]]:
        is_in_order = getattr(self._source, "in_order", True) or not self._source.num_workers
        for batch in batches:
            of_batch = rows.popleft()
            # Workers that may overtake each other hide which batch this is; nothing is trimmed then.
            yield batch, of_batch if is_in_order else None

    # -- map-style datasets: the batch sampler is wrapped --------------------------------------------------------------

    def _cut_indices(self, sharding: DataSharding) -> None:
        loader, source = self.loader, self._source
        takes_whole_batches = (
            loader.batch_sampler is None
        )  # batch_size=None: the sampler gives the dataset's key of a batch
        batch_sampler: Any = loader.sampler if takes_whole_batches else loader.batch_sampler
        if takes_whole_batches and not isinstance(batch_sampler, BatchSampler):
            if sharding.num_local_shards > 1:
                raise UnsupportedError(
                    f"a DataLoader with batch_size=None gives whole batches, and this process feeds {sharding.num_local_shards}"
                    " data shards from one",
                    "give the DataLoader a batch_size, or a BatchSampler as its sampler",
                )
            sharding.check(None)
            batch_sampler = _Keys(batch_sampler)
        self._sampler = ShardedBatchSampler(self._order.follow(batch_sampler), sharding, on_start=self._order.draw)
        self._length = self._sampler if isinstance(batch_sampler, Sized) else None
        # DataLoader forbids to assign these after construction, because its own iterators may be running; this copy has none.
        if not takes_whole_batches:
            vars(source)["batch_sampler"] = self._sampler
        elif isinstance(batch_sampler, _Keys):
            vars(source)["sampler"] = _FirstOf(self._sampler)
        else:
            vars(source)["sampler"] = self._sampler

    # -- iterable datasets: the stream is wrapped ----------------------------------------------------------------------

    def _cut_stream(self, sharding: DataSharding) -> None:
        loader, source = self.loader, self._source
        self._order.follow_dataset(loader.dataset)
        if isinstance(loader.dataset, Sized):
            dataset: Any = loader.dataset
            self._length = IterableShard(dataset, sharding, batch_size=loader.batch_size, drop_last=loader.drop_last)
        if sharding.num_shards == 1:
            return
        if loader.batch_size is None:
            collate: Callable[[list[Any]], Any] = _Whole(loader.collate_fn, sharding)
            cut = DataSharding() if sharding.split_batches else sharding
        else:
            collate, cut = loader.collate_fn, sharding
        vars(source)["dataset"] = _ShardedStream(loader.dataset, cut, loader.batch_size, loader.drop_last, collate)
        vars(source)["batch_size"] = vars(source)["batch_sampler"] = None
        vars(source)["drop_last"] = False
        source.collate_fn = _as_it_is
        self._carries_rows = True


class _Stream(IterableDataset[Any]):
    """Any iterable as a dataset."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)


class _SizedStream(_Stream):
    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]


def _sized_stream(iterable: Iterable[Any]) -> _Stream:
    return _SizedStream(iterable) if isinstance(iterable, Sized) else _Stream(iterable)


class _ShardedStream(IterableDataset[Any]):
    """Yields (collated batch of this process, rows); the cut runs where the dataset runs, in workers too."""

    def __init__(
        self,
        dataset: Any,
        sharding: DataSharding,
        batch_size: int | None,
        drop_last: bool,
        collate: Callable[[list[Any]], Any],
    ) -> None:
        self._dataset = dataset
        self._sharding = sharding
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._collate = collate

    def __iter__(self) -> Iterator[tuple[Any, GlobalRows | None]]:
        shard = IterableShard(self._dataset, self._sharding, batch_size=self._batch_size, drop_last=self._drop_last)
        for samples, rows in shard:
            yield self._collate(samples), rows


class _Whole:
    """Makes this process's batch from elements that are batches: joins those of its shards, or cuts one by `split_batches`."""

    def __init__(self, convert: Callable[[Any], Any], sharding: DataSharding) -> None:
        self._convert = convert
        self._sharding = sharding

    def __call__(self, elements: list[Any]) -> Any:
        batches = [self._convert(element) for element in elements]
        cut = self._sharding
        if cut.split_batches:
            return trees.map_leaves(self._slice, batches[0])
        return batches[0] if len(batches) == 1 else trees.map_leaves(lambda *parts: _join(parts), *batches)

    def _slice(self, leaf: Any) -> Any:
        cut = self._sharding
        if not hasattr(leaf, "shape") or not len(leaf.shape):
            return leaf
        if leaf.shape[0] % cut.num_shards:
            raise PrepareError(
                f"split_batches=True cuts a batch of {leaf.shape[0]} samples over {cut.num_shards} data shards, and they would"
                " not be equal",
                f"let the dataset give batches of a multiple of {cut.num_shards} samples",
            )
        part = leaf.shape[0] // cut.num_shards
        return leaf[cut.first_shard * part : (cut.first_shard + cut.num_local_shards) * part]


class _Keys:
    """A sampler of keys as a batch sampler of one key per batch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[Any]]:
        return ([key] for key in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class _FirstOf:
    """The only key of every batch."""

    def __init__(self, batch_sampler: ShardedBatchSampler) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batch_sampler)
        return (batch[0] for batch in batches)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class _RandomOrder:
    """Draws the order of each pass, once, and makes it the same on all processes.

    The default random sampler draws a seed from the global generator when a pass starts. Here the seed is drawn at the same
    moment from the same generator, but kept, so that process 0's can be sent to the others and a pass can be repeated.
    """

    def __init__(self, synchronize: Synchronize | None, rng_types: tuple[str, ...]) -> None:
        self.seed: int | None = None
        self.replay: int | None = None
        self._synchronize = synchronize
        self._private: torch.Generator | None = None
        self.own: torch.Generator | None = None
        self._globals = tuple(name for name in rng_types if name != "generator")
        self._is_shared = synchronize is not None and "generator" in rng_types
        for name in rng_types:
            if name not in RNG_TYPES:
                raise UnsupportedError(
                    f"rng_types names {name!r}, a generator that a torch DataLoader cannot take from process 0",
                    f"use: {', '.join(sorted(RNG_TYPES))}",
                )

    def follow(self, batch_sampler: Any) -> Any:
        """The batch sampler, with its random sampler drawing from here; the user's own object where nothing has to change."""
        sampler: Any = getattr(batch_sampler, "sampler", None)
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            self.own = sampler.generator
            return batch_sampler
        has_no_state = type(sampler) is RandomSampler and type(batch_sampler) in (BatchSampler, _Keys)
        if not has_no_state and not (self._is_shared and hasattr(sampler, "generator")):
            return batch_sampler
        self._private = torch.Generator()
        if has_no_state:  # torch's own classes: a copy serves as well, and the user's loader stays as it is
            batch_sampler = copy.copy(batch_sampler)
            batch_sampler.sampler = sampler = copy.copy(sampler)
        sampler.generator = self._private
        return batch_sampler

    def follow_dataset(self, dataset: Any) -> None:
        """An iterable dataset may shuffle with a generator of its own."""
        generator = getattr(dataset, "generator", None)
        if isinstance(generator, torch.Generator):
            self.own = generator

    def draw(self) -> None:
        """Called when a pass starts, right before its first index is drawn."""
        if self._private is not None:
            drawn, self.replay = self.replay, None
            if drawn is None:
                drawn = int(torch.empty((), dtype=torch.int64).random_().item())
                if self._is_shared:
                    drawn = self._from_main(drawn)
            self.seed = drawn
            self._private.manual_seed(drawn)
        if self._synchronize is None:
            return
        if self.own is not None and self._is_shared:
            self.own.set_state(self._shared_tensor(self.own.get_state()))
        for name in self._globals:
            self._share_global(name)

    def _from_main(self, value: Any) -> Any:
        assert self._synchronize is not None
        return self._synchronize(value)

    def _shared_tensor(self, state: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._from_main(state.numpy().tobytes())), dtype=torch.uint8)

    def _share_global(self, name: str) -> None:
        if name == "torch":
            torch.set_rng_state(self._shared_tensor(torch.get_rng_state()))
        elif name == "cuda":
            torch.cuda.set_rng_state(self._shared_tensor(torch.cuda.get_rng_state()))
        elif name == "python":
            version, words, gauss = self._from_main(random.getstate())
            random.setstate((version, tuple(words), gauss))
        else:
            import numpy as np

            kind, keys, position, has_gauss, gauss = self._from_main(np.random.get_state())
            np.random.set_state((kind, np.asarray(keys), position, has_gauss, gauss))


def _batch_size(loader: DataLoader[Any]) -> int | None:
    if loader.batch_size is not None:
        return loader.batch_size
    for sampler in (loader.batch_sampler, loader.sampler):
        size = getattr(sampler, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


def _join(parts: tuple[Any, ...]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor) and first.dim():
        return torch.cat(parts)
    if hasattr(first, "shape") and len(first.shape):
        import numpy as np

        return np.concatenate(parts)
    raise UnsupportedError(
        f"batches of several data shards cannot be joined: they hold a {type(first).__name__} without a batch dimension",
        "give the DataLoader a batch_size and let the dataset yield samples",
    )


def _as_it_is(batch: Any) -> Any:
    return batch
