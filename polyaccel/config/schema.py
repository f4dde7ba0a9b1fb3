"""The settings, one field each: name, type, default, meaning. There is no second place where a setting is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyaccel.mesh import MeshSpec
from polyaccel.precision import PrecisionPolicy

PARTITIONINGS = ("auto", "pmap", "sharding")
RNG_TYPES = ("python", "numpy", "generator", "torch", "cuda", "xla", "jax")


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved settings of one Accelerator. `sources[name]` says where a value that is no default came from."""

    backend: str = field(
        default="auto", metadata={"help": "engine: torch, xla, jax, or auto (the one whose framework is loaded)"}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per optimizer update"})
    mesh: MeshSpec = field(default_factory=MeshSpec, metadata={"help": "sizes of the mesh axes"})
    split_batches: bool = field(
        default=False, metadata={"help": "a loader's batch_size is the global batch, cut over the data shards"}
    )
    even_batches: bool = field(
        default=True,
        metadata={"help": "complete the last global batch from the first samples, so that all shards agree"},
    )
    cpu: bool = field(default=False, metadata={"help": "use the CPU even where an accelerator is present"})
    rng_types: tuple[str, ...] = field(
        default=("generator",),
        metadata={"help": "random generators that every process takes from process 0 at each epoch"},
    )
    step_scheduler_with_optimizer: bool = field(
        default=True, metadata={"help": "scheduler.step() follows optimizer updates; False: every call is one step"}
    )
    partitioning: Literal["auto", "pmap", "sharding"] = field(
        default="auto",
        metadata={
            "help": "jax: replica programs (pmap) or one global program (sharding); auto: pmap for torch, sharding for flax"
        },
    )
    compile: bool = field(default=False, metadata={"help": "torch: torch.compile the prepared model"})
    compile_backend: str = field(default="inductor", metadata={"help": "torch: the torch.compile backend"})
    compilation_cache: str = field(
        default="auto",
        metadata={"help": "jax, xla: folder of the persistent compilation cache; auto: the user's cache folder; off"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the engine's random stream until set_seed is called"})
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, metadata={"help": ""})

    @property
    def precision(self) -> PrecisionPolicy:
        """The policy that `mixed_precision` names."""
        return PrecisionPolicy.of(self.mixed_precision)
