"""Cuts a torch DataLoader over data shards and leaves everything else of it as it was: sampler, collate function, workers, pinning.

The copy shares the user's objects; only the batch sampler (or the iterable dataset) is wrapped. In one process the order is
drawn from the same generators at the same moments as in a hand-written loop.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from polyaccel.data import (
    UNKNOWN_ROWS,
    DataSharding,
    GlobalRows,
    IterableShard,
    PreparedLoader,
    ShardedBatchSampler,
    num_rows,
    refuse_prepared,
)
from polyaccel.data.spec import LoaderSpec
from polyaccel.errors import ConfigError, PrepareError, UnsupportedError
from polyaccel_torch.dialect.loaders import stateful
from polyaccel_torch.dialect.loaders.dispatch import DispatchedBatches
from polyaccel_torch.dialect.loaders.order import Exchange, Keys, RandomOrder
from polyaccel_torch.dialect.loaders.prepared import prepared_type
from polyaccel_torch.dialect.loaders.streams import Parts, ShardedStream, Whole, as_it_is, join, slice_of, stream_of
from polyaccel_torch.dialect.worker_signals import outliving

_WHOLE_SPEC = LoaderSpec()


class TorchHostLoader:
    """A DataLoader that can be cut. `loader` is the user's own and is not changed.

    Any other iterable is taken for one that gives whole batches; their numpy arrays become tensors, as in a DataLoader.
    Raises PrepareError for a loader that is cut already, by a DistributedSampler or by an earlier prepare.
    """

    def __init__(self, loader: DataLoader[Any] | Iterable[Any]) -> None:
        refuse_prepared(loader)
        self._is_dataloader = isinstance(loader, DataLoader)
        if not isinstance(loader, DataLoader):
            loader = DataLoader(stream_of(loader), batch_size=None)
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
        spec: LoaderSpec = _WHOLE_SPEC,
        exchange: Exchange | None = None,
        process_index: int = 0,
        pin_memory: bool = False,
    ) -> TorchHostBatches | DispatchedBatches:
        """This process's part of every global batch, as host batches, in pinned memory if `pin_memory`.

        `exchange` gives everyone's value to everyone, and must be given when there are several processes: they take process 0's
        random order, and with `spec.dispatch_batches` its batches. `spec.rng_types` says which generators that covers
        ("generator": the sampler's own). Raises ConfigError, PrepareError or UnsupportedError.
        """
        dispatches = self._dispatches(spec)
        if not dispatches or exchange is None:
            order = RandomOrder(exchange, spec.rng_types)
            return TorchHostBatches(
                self.loader, sharding, order, spec=spec, pin_memory=pin_memory, is_dispatched=dispatches
            )
        order = RandomOrder(None, spec.rng_types)
        source = TorchHostBatches(self.loader, sharding, order, spec=spec, deals_out=True, is_dispatched=True)
        return DispatchedBatches(source, sharding, exchange, is_main=process_index == 0)

    def _dispatches(self, spec: LoaderSpec) -> bool:
        """Accelerate's rule where nothing is said: process 0 reads iterable datasets for all."""
        if spec.dispatch_batches and not spec.device_placement:
            raise ConfigError(
                "dispatch_batches=True sends batches to the devices, and device_placement=False keeps them on the host",
                "leave one of the two out",
            )
        if spec.dispatch_batches is None:
            return self._is_dataloader and isinstance(self.loader.dataset, IterableDataset) and spec.device_placement
        return spec.dispatch_batches


class TorchHostBatches:
    """A DataLoader's batches for one process; see `polyaccel.data.HostBatches`.

    With `deals_out`, a list of the batches of all processes, for a process that reads for them. A loader with
    torchdata's protocol (StatefulDataLoader, an iterable with `state_dict`) goes on from its own state; see `resume_source`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sharding: DataSharding,
        order: RandomOrder,
        *,
        spec: LoaderSpec = _WHOLE_SPEC,
        pin_memory: bool = False,
        deals_out: bool = False,
        is_dispatched: bool = False,
    ) -> None:
        self.loader = loader
        self.batch_size = _batch_size(loader)
        self.total_batch_size = sharding.total_batch_size(self.batch_size)
        self._order = order
        self._deals_out = deals_out
        # A copy keeps a subclass, its options and those of future torch versions.
        self._source = copy.copy(stateful.stateful_loader(loader) if spec.use_stateful_dataloader else loader)
        self._source._iterator = None  # persistent workers belong to one loader
        if pin_memory:
            self._source.pin_memory = True
        self._chosen_by: Any = None  # the batch sampler that is cut
        self._sampler: ShardedBatchSampler | None = None
        self._length: Sized | None = None
        self._carries_rows = False
        if isinstance(loader.dataset, IterableDataset):
            self._cut_stream(sharding)
        else:
            self._cut_indices(sharding, spec)
        self._knowing = _knowing(self._source, loader.dataset)
        self._known: deque[Any] = deque()  # its states after the batches that are read and not handed out
        self.latest: Any = None
        self._resumed: tuple[Any, int] | None = None
        self.prepared_type: type[PreparedLoader] = prepared_type(
            is_dispatched=is_dispatched, is_stateful=stateful.is_stateful(self._source)
        )

    @property
    def seed(self) -> int | None:
        """The seed of the current pass's order, if the default random sampler drew one."""
        return self._order.seed

    @property
    def has_random_order(self) -> bool:
        """Whether a generator known here decides the order."""
        return not self._order.is_fixed

    @property
    def source(self) -> DataLoader[Any]:
        """The DataLoader that is iterated over: the user's, cut."""
        return self._source

    @property
    def batch_sampler(self) -> Any:
        """What chooses the indices: the user's batch sampler, cut where there are several shards. None without indices."""
        if self._chosen_by is None:
            return self.loader.batch_sampler
        return self._chosen_by if self._sampler is None or self._sampler.sharding.num_shards == 1 else self._sampler

    def read_generators(self) -> tuple[bytes, ...]:
        """The states of the generators that the user gave to the loader, its sampler or its dataset."""
        return self._order.read(self.loader.generator)

    def write_generators(self, states: tuple[bytes, ...]) -> None:
        """Continue from states that `read_generators` gave. Raises CheckpointError for another number of generators."""
        self._order.write(states, self.loader.generator)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"a {type(self.loader.dataset).__name__} without __len__ has no number of batches")
        return len(self._length)

    def set_epoch(self, epoch: int) -> None:
        """Reaches batch sampler, sampler and dataset, where they have `set_epoch`."""
        parts: tuple[Any, ...] = (self._chosen_by, getattr(self._chosen_by, "sampler", None))
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if hasattr(self.loader.dataset, "set_epoch"):
            self.loader.dataset.set_epoch(epoch)

    # -- a pass --------------------------------------------------------------------------------------------------------

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        """One pass from batch `skip` on; see `HostBatches.read`."""
        if self._source.num_workers:
            self._source.worker_init_fn = outliving(self.loader.worker_init_fn)
        self._order.seed, self._order.replay = None, seed
        resumed, self._resumed = self._resumed, None
        self._known.clear()
        self.latest = None
        num_known = 0
        if resumed is not None:  # the source goes there by itself
            state, num_known = resumed
            self._knowing.load_state_dict(state)
            skip = 0
        items = self._read_indices(skip, num_known) if self._sampler is not None else self._read_stream(skip)
        return items if self._knowing is None else self._noting(items)

    def _read_indices(self, skip: int, num_known: int) -> Iterator[tuple[Any, GlobalRows | None]]:
        assert self._sampler is not None
        self._sampler.skip_next(skip)
        batches = iter(self._source)
        read = self._grouped if self._deals_out else self._with_rows
        return read(batches, self._sampler.rows, self._sampler.counts, num_known)

    def _read_stream(self, skip: int) -> Iterator[tuple[Any, GlobalRows | None]]:
        self._order.draw()
        stream = iter(self._source)
        for _ in range(skip):  # a stream can only be skipped by reading it
            if next(stream, None) is None:
                break
        return (
            (tuple(item) for item in stream)
            if self._carries_rows
            else ((batch, self._rows_of(batch)) for batch in stream)
        )

    def _rows_of(self, batch: Any) -> GlobalRows | None:
        """Of a batch that is the global one: None where it is as large as all."""
        if self.batch_size is None:
            return None
        size = num_rows(batch)
        return None if size == self.batch_size else GlobalRows((size,), size, self.batch_size)

    def _with_rows(
        self, batches: Iterator[Any], rows: deque[GlobalRows | None], counts: deque[int], num_known: int
    ) -> Iterator[tuple[Any, GlobalRows | None]]:
        is_in_order = getattr(self._source, "in_order", True) or not self._source.num_workers
        for batch in batches:
            for _ in range(num_known):  # the source has walked over them
                rows.popleft()
            num_known = 0
            if is_in_order:
                yield batch, rows.popleft()
                continue
            # Workers that may overtake each other hide which of the drawn batches this is.
            is_whole = not any(rows)
            rows.remove(None if None in rows else rows[0])
            is_alone = self._sampler is not None and self._sampler.sharding.num_shards == 1  # and repeats nothing
            yield batch, self._rows_of(batch) if is_alone else None if is_whole else UNKNOWN_ROWS

    def _grouped(
        self, batches: Iterator[Any], rows: deque[GlobalRows | None], counts: deque[int], num_known: int
    ) -> Iterator[tuple[Any, GlobalRows | None]]:
        for first in batches:
            for _ in range(num_known):
                rows.popleft()
                counts.popleft()
            num_known = 0
            of_batch, count = rows.popleft(), counts.popleft()
            yield [first, *(next(batches) for _ in range(count - 1))], of_batch

    # -- a source that knows where it stands ---------------------------------------------------------------------------

    def _noting(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self._known.append(self._knowing.state_dict())
            yield item

    @property
    def knows_position(self) -> bool:
        """Whether the source says itself where it stands."""
        return self._knowing is not None

    def hand_out(self) -> None:
        """The next batch that was read is in use now."""
        self.latest = self._known.popleft()

    def source_state(self) -> bytes | None:
        """The source's own state after the latest batch that was handed out. Raises UnsupportedError where it is no plain data."""
        return None if self.latest is None else stateful.to_bytes(self.latest)

    def resume_source(self, state: bytes, num_batches: int) -> None:
        """Let the next pass go on from a state that `source_state` gave after `num_batches` batches of the pass."""
        self._resumed = stateful.from_bytes(state), num_batches

    # -- map-style datasets: the batch sampler is wrapped --------------------------------------------------------------

    def _cut_indices(self, sharding: DataSharding, spec: LoaderSpec) -> None:
        source = self._source
        takes_whole_batches = (
            source.batch_sampler is None
        )  # batch_size=None: the sampler gives the dataset's key of a batch
        batch_sampler: Any = source.sampler if takes_whole_batches else source.batch_sampler
        if takes_whole_batches and not isinstance(batch_sampler, BatchSampler):
            if sharding.num_local_shards > 1 and not self._deals_out:
                raise UnsupportedError(
                    f"a DataLoader with batch_size=None gives whole batches, and this process feeds {sharding.num_local_shards}"
                    " data shards from one",
                    "give the DataLoader a batch_size, or a BatchSampler as its sampler",
                )
            sharding.check(None)
            batch_sampler = Keys(batch_sampler)
        if spec.use_seedable_sampler:
            batch_sampler = self._order.make_seedable(batch_sampler, spec.data_seed)
        batch_sampler = self._order.follow(batch_sampler)
        self._chosen_by = batch_sampler
        self._length = batch_sampler if isinstance(batch_sampler, Sized) else None
        is_uncut = sharding.num_shards == 1 and not self._deals_out
        if is_uncut and self._order.is_fixed and stateful.is_stateful(source):
            return  # nothing to cut and nothing to draw: the source's state is torchdata's, to the letter
        self._sampler = ShardedBatchSampler(
            batch_sampler, sharding, on_start=self._order.draw, deals_out=self._deals_out
        )
        if self._length is not None:
            self._length = self._sampler
        # DataLoader forbids to assign these after construction, because its own iterators may be running; this copy has none.
        if not takes_whole_batches:
            vars(source)["batch_sampler"] = self._sampler
        elif isinstance(batch_sampler, Keys):
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
        if sharding.num_shards == 1 and not self._deals_out:
            return
        cut, batch_size = sharding, loader.batch_size
        collate: Callable[[list[Any]], Any] = loader.collate_fn
        if batch_size is None and not self._deals_out:
            collate = Whole(loader.collate_fn, sharding)
        elif batch_size is None:
            collate = _OfEveryProcess(loader.collate_fn, sharding)
        if batch_size is None and sharding.split_batches:
            cut = DataSharding()
        vars(source)["dataset"] = ShardedStream(
            loader.dataset, cut, batch_size, loader.drop_last, collate, deals_out=self._deals_out
        )
        vars(source)["batch_size"] = vars(source)["batch_sampler"] = None
        vars(source)["drop_last"] = False
        source.collate_fn = as_it_is
        self._carries_rows = True


class _OfEveryProcess:
    """Makes a process's batch from elements that are batches; the parts of one that `split_batches` cuts come as a list."""

    def __init__(self, convert: Callable[[Any], Any], sharding: DataSharding) -> None:
        self._convert = convert
        self._sharding = sharding

    def __call__(self, elements: list[Any]) -> Any:
        batches, cut = [self._convert(element) for element in elements], self._sharding
        if not cut.split_batches:
            return join(batches)
        local = cut.num_local_shards
        return Parts([slice_of(batches[0], cut, first, local) for first in range(0, cut.num_shards, local)])


class _FirstOf:
    """The only key of every batch."""

    def __init__(self, batch_sampler: ShardedBatchSampler) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batch_sampler)
        return (batch[0] for batch in batches)

    def __len__(self) -> int:
        return len(self.batch_sampler)


def _knowing(source: DataLoader[Any], dataset: Any) -> Any:
    """What has torchdata's protocol: the loader, or the iterable that it was made of; None where nothing has."""
    iterable = getattr(dataset, "iterable", None)
    return next((one for one in (source, iterable) if one is not None and stateful.is_stateful(one)), None)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    if loader.batch_size is not None:
        return loader.batch_size
    for sampler in (loader.batch_sampler, loader.sampler):
        size = getattr(sampler, "batch_size", None)
        if isinstance(size, int):
            return size
    return None
