"""`accelerate.data_loader`: samplers and shards as classes of their own, and its loader classes as names of what `prepare` gives.

`DataLoaderShard(...)` and its like build a prepared loader that reports to the newest Accelerator; `isinstance` knows those that
`accelerator.prepare` made too. What is torch's by inheritance is the torch adapter's, which is imported when it is asked for.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

from polyaccel import jobs
from polyaccel.compat.state import GradientState, PartialState
from polyaccel.data import DataSharding, PreparedLoader
from polyaccel.data.spec import LoaderSpec
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.registry import served_by

_SERVED = ("BatchSamplerShard", "IterableDatasetShard", "SeedableRandomSampler", "SkipBatchSampler", "get_sampler")

__all__ = [  # noqa: F822 - those of _SERVED come from __getattr__
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


def __getattr__(name: str) -> Any:
    if name not in _SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_torch(), name)


def _torch() -> Any:
    """The torch adapter's part. Raises BackendUnavailableError, with the line that installs it, where torch is not here."""
    return served_by("torch", "own_loaders", "makes no loaders but those of prepare")


class _Name(ABC):
    """A name for the adapter's class `kind`, and for its subclasses; a subclass of the name is a name for itself alone."""

    kind: ClassVar[str]

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        if "kind" not in vars(cls) or not issubclass(other, PreparedLoader):
            return NotImplemented
        return issubclass(other, getattr(_torch(), cls.kind)) or NotImplemented


class DataLoaderStateMixin(_Name):
    """Any prepared torch loader: it has `end_of_dataloader` and `remainder`."""

    kind = "TorchLoader"


class DataLoaderAdapter(_Name):
    """Any prepared torch loader: `base_dataloader` is the DataLoader that it iterates over."""

    kind = "TorchLoader"


class DataLoaderShard(_Name):
    """A prepared loader whose processes read for themselves. Called with a dataset, it makes one of this process's own data.

    Takes a DataLoader's keyword arguments beside those below; `rng_types` are taken from process 0 whenever a loop starts.
    """

    kind = "ShardedLoader"

    def __new__(  # type: ignore[misc]
        cls,
        dataset: Any,
        device: Any = None,
        rng_types: list[str] | None = None,
        synchronized_generator: Any = None,  # torch.Generator
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
        spec = LoaderSpec(
            rng_types=tuple(str(name) for name in rng_types or ()),
            dispatch_batches=False,
            use_stateful_dataloader=use_stateful_dataloader,
            non_blocking=_non_blocking,
        )
        given, sharding = kwargs.get("batch_sampler"), DataSharding()
        if isinstance(given, _torch().BatchSamplerShard):
            kwargs["batch_sampler"], sharding = given.batch_sampler, given.sharding
        loader = _torch().DataLoader(dataset, **kwargs)
        return _prepared(loader, sharding, spec, device, exchanges=bool(rng_types), skip=skip_batches, epoch=iteration)


class DataLoaderDispatcher(_Name):
    """A prepared loader that process 0 reads for all. Called with a dataset, it makes one; takes a DataLoader's keyword arguments too."""

    kind = "DispatchedLoader"

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
        loader = _torch().DataLoader(dataset, **kwargs)
        device = _torch().device_of(jobs.current())
        return _prepared(loader, sharding, spec, device, skip=skip_batches, epoch=iteration)


class SkipDataLoader(_Name):
    """A prepared loader whose passes leave out the first `skip_batches` batches. Called with a dataset, it makes one."""

    kind = "TorchLoader"

    def __new__(  # type: ignore[misc]
        cls, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> PreparedLoader:
        spec = LoaderSpec(dispatch_batches=False, use_stateful_dataloader=use_stateful_dataloader)
        loader = _torch().DataLoader(dataset, **kwargs)
        return _prepared(loader, DataSharding(), spec, None, exchanges=False, skip=skip_batches)


def prepare_data_loader(
    dataloader: Any,
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
    return _prepared(dataloader, sharding, spec, device if put_on_device else None, exchanges=(shards, index) == here)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """A loader without the first `num_batches` batches: of every pass, and of the pass that `load_state` continues.

    A prepared loader keeps all its options. Of a DataLoader that is not prepared yet a DataLoader is made.
    """
    if isinstance(dataloader, PreparedLoader):
        return dataloader.skipping(num_batches)
    if _torch().is_stream(dataloader):
        spec = LoaderSpec(dispatch_batches=False)
        return _prepared(dataloader, DataSharding(), spec, None, exchanges=False, skip=num_batches)
    return _torch().without_first_batches(dataloader, num_batches)


def _prepared(
    loader: Any,
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
    made: PreparedLoader = _torch().prepared(
        loader, sharding, spec, device, engine=engine, observer=GradientState()._state, skip=skip, epoch=epoch
    )
    return made


def _refuse_slicing(function: Callable[..., Any] | None) -> None:
    if function is not None:
        raise UnsupportedError(
            "batches that process 0 sends cannot be cut by a slice_fn: each process gets a batch that was collated for it",
            "let the loader's collate_fn make the batch of one process",
        )
