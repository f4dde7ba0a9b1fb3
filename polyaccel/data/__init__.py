"""Which sample goes where, how ragged samples become few shapes, and the loader that every engine gives to user code."""

from polyaccel.data.bucketing import Bucketing, counted, masked_mean, multiples, powers
from polyaccel.data.loader import (
    HostBatches,
    LoaderObserver,
    LoaderState,
    PreparedLoader,
    prepared_loader,
    refuse_prepared,
    skip_first_batches,
)
from polyaccel.data.sharding import UNKNOWN_ROWS, DataSharding, GlobalRows, IterableShard, ShardedBatchSampler, num_rows

__all__ = [
    "UNKNOWN_ROWS",
    "Bucketing",
    "DataSharding",
    "GlobalRows",
    "HostBatches",
    "IterableShard",
    "LoaderObserver",
    "LoaderState",
    "PreparedLoader",
    "ShardedBatchSampler",
    "counted",
    "masked_mean",
    "multiples",
    "num_rows",
    "powers",
    "prepared_loader",
    "refuse_prepared",
    "skip_first_batches",
]
