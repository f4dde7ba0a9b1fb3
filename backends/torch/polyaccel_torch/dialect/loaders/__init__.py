"""torch DataLoaders: cut over data shards, read by every process or by process 0 for all, and what `prepare` gives for them."""

from polyaccel_torch.dialect.loaders.host import TorchHostBatches, TorchHostLoader
from polyaccel_torch.dialect.loaders.order import SeedableRandomSampler
from polyaccel_torch.dialect.loaders.prepared import DispatchedLoader, ShardedLoader, TorchLoader

__all__ = [
    "DispatchedLoader",
    "SeedableRandomSampler",
    "ShardedLoader",
    "TorchHostBatches",
    "TorchHostLoader",
    "TorchLoader",
]
