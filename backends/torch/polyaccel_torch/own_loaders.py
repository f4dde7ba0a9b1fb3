"""Loaders that a script prepares by itself, for a job that the core describes: what `polyaccel.compat.data_loader` gives names to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from polyaccel.data import DataSharding, LoaderObserver, PreparedLoader, prepared_loader
from polyaccel.data.spec import LoaderSpec
from polyaccel_torch.dialect.loaders import (
    DispatchedLoader,
    SeedableRandomSampler,
    ShardedLoader,
    TorchHostLoader,
    TorchLoader,
)
from polyaccel_torch.dialect.loaders.cuts import (
    BatchSamplerShard,
    IterableDatasetShard,
    SkipBatchSampler,
    get_sampler,
    is_stream,
    without_first_batches,
)
from polyaccel_torch.placement import StreamFeeder

if TYPE_CHECKING:
    from polyaccel.protocols import Engine

__all__ = [
    "BatchSamplerShard",
    "DataLoader",
    "DispatchedLoader",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "ShardedLoader",
    "SkipBatchSampler",
    "TorchLoader",
    "device_of",
    "get_sampler",
    "is_stream",
    "prepared",
    "without_first_batches",
]


def prepared(
    loader: DataLoader[Any],
    sharding: DataSharding,
    spec: LoaderSpec,
    device: Any,
    *,
    engine: Engine | None,
    observer: LoaderObserver,
    skip: int,
    epoch: int,
) -> PreparedLoader:
    """One process's part of a loader, on `device` (None: the host); its first pass is the one with the number `epoch`.

    With an `engine`, of whatever kind, the processes of its job take the order, and dispatched batches, from process 0.
    """
    place = torch.device("cpu" if device is None else device)
    host = TorchHostLoader(loader).shard(
        sharding,
        spec=spec,
        exchange=None if engine is None else engine.collectives.all_gather_object,
        process_index=0 if engine is None else engine.topology.process_index,
        pin_memory=spec.non_blocking and place.type == "cuda",
    )
    if place.type == "cpu":
        result = prepared_loader(host, observer=observer, prefetch=1, skip=skip)
    else:
        feeder = StreamFeeder(place, None)
        result = prepared_loader(host, place=feeder.place, lift=feeder.hand_out, observer=observer, skip=skip)
    if epoch:
        result.set_epoch(epoch)
    return result


def device_of(engine: Any) -> torch.device:
    """The engine's device, where torch has it; on another engine batches stay on the host until a step takes them."""
    device: Any = getattr(engine, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")
