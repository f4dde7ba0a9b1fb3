"""Models whose parameters lie in pieces on a mesh of processes: FSDP2, its hybrid form, tensor parallelism, and their products."""

from polyaccel_torch.sharded.engine_part import Sharding as Sharding
