"""Which sample goes where, and the loader that every engine gives to user code. Standard library only."""

from polyaccel.data.loader import HostBatches, LoaderObserver, LoaderState, PreparedLoader, refuse_prepared
from polyaccel.data.sharding import DataSharding, IterableShard, ShardedBatchSampler

__all__ = [
    "DataSharding",
    "HostBatches",
    "IterableShard",
    "LoaderObserver",
    "LoaderState",
    "PreparedLoader",
    "ShardedBatchSampler",
    "refuse_prepared",
]
