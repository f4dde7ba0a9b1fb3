"""`accelerate.data_loader`: samplers and shards as classes of their own, and its loader classes as names of what `prepare` gives.

`DataLoaderShard(...)` and its like build a prepared loader that reports to the newest Accelerator; `isinstance` knows those that
`accelerator.prepare` made too.
"""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from polyaccel import jobs
from polyaccel.compat.state import GradientState, PartialState
from polyaccel.data import DataSharding, IterableShard, PreparedLoader, ShardedBatchSampler, prepared_loader
from polyaccel.data.spec import LoaderSpec
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel_torch.dialect.loaders import (
    DispatchedLoader,
    SeedableRandomSampler,
    ShardedLoader,
    TorchHostLoader,
    TorchLoader,
)
from polyaccel_torch.placement import StreamFeeder

__all__ = [
    "BatchSamplerShard",
    "DataLoaderAdapter",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "get_sampler",
    "prepare_data_loader",
    "skip_first_batches",
]


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


class DataLoaderStateMixin(ABC):  # noqa: B024 - a name for isinstance
    """Any prepared torch loader: it has `end_of_dataloader` and `remainder`."""


class DataLoaderAdapter(ABC):  # noqa: B024 - a name for isinstance
    """Any prepared torch loader: `base_dataloader` is the DataLoader that it iterates over."""


class DataLoaderShard(ABC):  # noqa: B024 - a name for isinstance
    """A prepared loader whose processes read for themselves. Called with a dataset, it makes one of this process's own data.

    Takes a DataLoader's keyword arguments beside those below; `rng_types` are taken from process 0 whenever a loop starts.
    """

    def __new__(  # type: ignore[misc]
        cls,
        dataset: Any,
        device: Any = None,
        rng_types: list[str] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> PreparedLoader:
        if synchronized_generator is not None and kwargs.get("generator") is None:
            kwargs["generator"] = synchronized_generator
        given, sharding = kwargs.get("batch_sampler"), DataSharding()
        if isinstance(given, BatchSamplerShard):
            kwargs["batch_sampler"], sharding = given.batch_sampler, given.sharding
        spec = LoaderSpec(
            rng_types=tuple(str(name) for name in rng_types or ()),
            dispatch_batches=False,
            use_stateful_dataloader=use_stateful_dataloader,
            non_blocking=_non_blocking,
        )
        return _made(
            DataLoader(dataset, **kwargs),
            sharding,
            spec,
            device,
            exchanges=bool(rng_types),
            skip=skip_batches,
            epoch=iteration,
        )


class DataLoaderDispatcher(ABC):  # noqa: B024 - a name for isinstance
    """A prepared loader that process 0 reads for all. Called with a dataset, it makes one; takes a DataLoader's keyword arguments too."""

    def __new__(  # type: ignore[misc]
        cls,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> PreparedLoader:
        _refuse_slicing(slice_fn)
        state = PartialState()
        sharding = DataSharding(state.num_processes, state.process_index, 1, split_batches)
        spec = LoaderSpec(
            split_batches=split_batches,
            dispatch_batches=True,
            use_stateful_dataloader=use_stateful_dataloader,
            non_blocking=_non_blocking,
        )
        return _made(DataLoader(dataset, **kwargs), sharding, spec, _torch_device(), skip=skip_batches, epoch=iteration)


class SkipDataLoader(ABC):  # noqa: B024 - a name for isinstance
    """A prepared loader whose passes leave out the first `skip_batches` batches. Called with a dataset, it makes one."""

    def __new__(  # type: ignore[misc]
        cls, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> PreparedLoader:
        spec = LoaderSpec(dispatch_batches=False, use_stateful_dataloader=use_stateful_dataloader)
        return _made(DataLoader(dataset, **kwargs), DataSharding(), spec, None, exchanges=False, skip=skip_batches)


for _name in (DataLoaderStateMixin, DataLoaderAdapter, SkipDataLoader):
    _name.register(TorchLoader)
DataLoaderShard.register(ShardedLoader)
DataLoaderDispatcher.register(DispatchedLoader)


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """The sampler that chooses a loader's samples."""
    batch_sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    return getattr(batch_sampler, "sampler", None)


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: Any = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[str] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> PreparedLoader:
    """A loader of one process's part of the data, as `accelerator.prepare` makes it, for any number of processes.

    The processes are those of the job unless `num_processes` and `process_index` say otherwise. Batches are put on `device` with
    `put_on_device`; process 0 can only read for all (`dispatch_batches`) if they are. `rng_types` None: the sampler's own generator is
    taken from process 0. Raises ConfigError, PrepareError or UnsupportedError, which are ValueErrors where Accelerate raises one.
    """
    _refuse_slicing(slice_fn_for_dispatch)
    state = PartialState()
    here = (state.num_processes, state.process_index)
    index = state.process_index if process_index is None else process_index
    shards = state.num_processes if num_processes is None else num_processes
    if torch_device_mesh is not None:
        raise UnsupportedError(
            "prepare_data_loader takes no torch_device_mesh: the mesh is the Accelerator's",
            "use accelerator.prepare, with Accelerator(mesh=...)",
        )
    if dispatch_batches and not put_on_device:
        raise ConfigError("dispatch_batches=True needs put_on_device=True", "set put_on_device=True")
    spec = LoaderSpec(
        split_batches=split_batches,
        even_batches=even_batches,
        rng_types=("generator",) if rng_types is None else tuple(str(name) for name in rng_types),
        dispatch_batches=dispatch_batches,
        use_seedable_sampler=use_seedable_sampler,
        data_seed=data_seed,
        use_stateful_dataloader=use_stateful_dataloader,
        non_blocking=non_blocking,
        device_placement=put_on_device,
    )
    accelerator = jobs.accelerator()
    if put_on_device and accelerator.backend != "torch" and (shards, index) == here:
        made: PreparedLoader = accelerator._prepared.prepare((dataloader,), spec=spec, placements=(True,))[0]
        return made
    sharding = DataSharding(shards, index, 1, split_batches, even_batches)
    return _made(dataloader, sharding, spec, device if put_on_device else None, exchanges=(shards, index) == here)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """A loader without the first `num_batches` batches: of every pass, and of the pass that `load_state` continues.

    A prepared loader keeps all its options. Of a DataLoader that is not prepared yet a DataLoader is made.
    """
    if isinstance(dataloader, PreparedLoader):
        return dataloader.skipping(num_batches)
    if isinstance(dataloader.dataset, IterableDataset):
        spec = LoaderSpec(dispatch_batches=False)
        return _made(dataloader, DataSharding(), spec, None, exchanges=False, skip=num_batches)
    skipping = copy.copy(dataloader)
    attribute = "sampler" if isinstance(dataloader.sampler, BatchSampler) else "batch_sampler"
    # A DataLoader forbids the assignment because its own iterators may be running; the copy has none.
    vars(skipping)[attribute] = SkipBatchSampler(getattr(dataloader, attribute), num_batches)
    vars(skipping)["_iterator"] = None
    return skipping


def _made(
    loader: DataLoader[Any],
    sharding: DataSharding,
    spec: LoaderSpec,
    device: Any,
    *,
    exchanges: bool = True,
    skip: int = 0,
    epoch: int = 0,
) -> PreparedLoader:
    """A prepared loader that reports to the newest Accelerator; `exchanges`: its processes are those of the job."""
    engine = jobs.current() if exchanges and PartialState().num_processes > 1 else None
    place = torch.device("cpu" if device is None else device)
    host = TorchHostLoader(loader).shard(
        sharding,
        spec=spec,
        exchange=None if engine is None else engine.collectives.all_gather_object,
        process_index=0 if engine is None else engine.topology.process_index,
        pin_memory=spec.non_blocking and place.type == "cuda",
    )
    observer = GradientState()._state
    if place.type == "cpu":
        made = prepared_loader(host, observer=observer, prefetch=1, skip=skip)
    else:
        feeder = StreamFeeder(place, None)
        made = prepared_loader(host, place=feeder.place, lift=feeder.hand_out, observer=observer, skip=skip)
    if epoch:
        made.set_epoch(epoch)
    return made


def _torch_device() -> torch.device:
    """The engine's device, where torch has it; on another engine batches stay on the host until a step takes them."""
    device: Any = getattr(jobs.current(), "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


def _refuse_slicing(function: Callable[..., Any] | None) -> None:
    if function is not None:
        raise UnsupportedError(
            "batches that process 0 sends cannot be cut by a slice_fn: each process gets a batch that was collated for it",
            "let the loader's collate_fn make the batch of one process",
        )
