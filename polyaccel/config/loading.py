"""How prepared loaders read: Accelerate's DataLoaderConfiguration. Every field is a setting of the same name."""

from __future__ import annotations

from dataclasses import dataclass

from polyaccel.config.handler import KwargsHandler


@dataclass
class DataLoaderConfiguration(KwargsHandler):
    """Settings of every loader that `prepare` gets.

    Args:
        split_batches: a loader's batch_size is the global batch and is cut over the data shards.
        dispatch_batches: process 0 alone reads, and sends every process its part; None: where the data asks for it.
        even_batches: complete the last global batch from the first samples, so that every shard has the same number of batches.
        use_seedable_sampler: an epoch's order follows from `data_seed` and the number of the epoch alone.
        data_seed: that seed; None: the one of `set_seed`.
        non_blocking: copies to the device do not wait for each other.
        use_stateful_dataloader: loaders are torchdata's StatefulDataLoader.
        prefetch_batches: how many batches are on their way to the device while one is used (not in Accelerate).
        read_in_background: a thread reads them, so that reading overlaps with a step that waits for its results (not in Accelerate).
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False
    prefetch_batches: int = 2
    read_in_background: bool = False
