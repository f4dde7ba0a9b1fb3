"""What the core tells an engine about the loaders that it prepares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from polyaccel.data.sharding import DataSharding
from polyaccel.errors import UnsupportedError


class DataShards(Protocol):
    """What a Plan says about the data shards of the job and of this process."""

    @property
    def num_data_shards(self) -> int: ...
    @property
    def first_data_shard(self) -> int: ...
    @property
    def num_local_data_shards(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """How loaders are cut over data shards and read: the settings of the same names; `prefetch` is `prefetch_batches`.

    `device_placement` False: batches stay where the loader made them. `lift(host_batch, placed_batch)` makes what user code sees.
    """

    split_batches: bool = False
    even_batches: bool = True
    rng_types: tuple[str, ...] = ("generator",)
    dispatch_batches: bool | None = None
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    use_stateful_dataloader: bool = False
    non_blocking: bool = False
    device_placement: bool = True
    prefetch: int = 2
    read_in_background: bool = False
    lift: Callable[[Any, Any], Any] | None = None

    def sharding(self, plan: DataShards) -> DataSharding:
        """The part of every global batch that a process with this plan reads."""
        return DataSharding(
            num_shards=plan.num_data_shards,
            first_shard=plan.first_data_shard,
            num_local_shards=plan.num_local_data_shards,
            split_batches=self.split_batches,
            even_batches=self.even_batches,
        )

    def check_iterable(self, loader: Any, *, is_alone: bool) -> None:
        """Raises UnsupportedError for a setting that `loader`, which is no torch loader and has no indices, cannot follow.

        `is_alone`: there is one process.
        """
        name = type(loader).__name__
        if self.dispatch_batches and not is_alone:
            raise UnsupportedError(
                f"dispatch_batches=True lets process 0 read for all, and a {name} is read by every process",
                "leave dispatch_batches out: every process keeps its own part of each batch",
            )
        if self.use_stateful_dataloader:
            raise UnsupportedError(
                f"use_stateful_dataloader=True makes torch DataLoaders torchdata's, and this is a {name}",
                "leave it out: checkpoints continue every loader where it stood",
            )
