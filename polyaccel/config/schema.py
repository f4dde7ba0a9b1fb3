"""The settings, one field each: name, type, default, meaning. There is no second place where a setting is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyaccel.mesh import MeshSpec
from polyaccel.precision import MIXED_PRECISIONS, PrecisionPolicy

PARTITIONINGS = ("auto", "pmap", "sharding")
RNG_TYPES = ("python", "numpy", "generator", "torch", "cuda", "xla", "jax")


def _setting(default: Any, help: str, *, kind: str | None = None, choices: tuple[str, ...] = (), least: int = 0) -> Any:
    """A field that is a setting. `kind` is needed where the default is None; `choices` and `least` bound the value."""
    return field(default=default, metadata={"help": help, "kind": kind, "choices": choices, "least": least})


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved settings of one Accelerator. `sources[name]` says where a value that is no default came from."""

    backend: str = _setting("auto", "engine: torch, xla, jax, or auto (the one whose framework is loaded)")
    mixed_precision: str = _setting("no", "no, bf16 or fp16", choices=MIXED_PRECISIONS)
    gradient_accumulation_steps: int = _setting(1, "batches per optimizer update", least=1)
    mesh: MeshSpec = field(default_factory=MeshSpec)
    split_batches: bool = _setting(False, "a loader's batch_size is the global batch, cut over the data shards")
    even_batches: bool = _setting(
        True, "complete the last global batch from the first samples, so that all shards agree"
    )
    cpu: bool = _setting(False, "use the CPU even where an accelerator is present")
    rng_types: tuple[str, ...] = _setting(
        ("generator",), "random generators that every process takes from process 0 at each epoch", choices=RNG_TYPES
    )
    step_scheduler_with_optimizer: bool = _setting(
        True, "scheduler.step() follows optimizer updates; false: every call is one step"
    )
    partitioning: Literal["auto", "pmap", "sharding"] = _setting(
        "auto",
        "jax: replica programs (pmap) or one global program (sharding); auto: pmap for torch, sharding for flax",
        choices=PARTITIONINGS,
    )
    compile: bool = _setting(False, "torch: torch.compile the prepared model")
    compile_backend: str = _setting("inductor", "torch: the torch.compile backend")
    compilation_cache: str = _setting(
        "auto", "jax, xla: folder of the persistent compilation cache; auto: the user's cache folder; off"
    )
    seed: int = _setting(0, "seed of the engine's random stream until set_seed is called")
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def precision(self) -> PrecisionPolicy:
        """The policy that `mixed_precision` names."""
        return PrecisionPolicy.of(self.mixed_precision)


MESH_HELP = {
    "replica": "data-parallel copies of the whole mesh (over slower links)",
    "data": "data-parallel replicas; -1: all devices that the other axes leave",
    "fsdp": "devices over which parameters are sharded, and the batch with them",
    "tensor": "devices over which single layers are split",
    "sequence": "devices over which sequences are split",
}


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How `polyaccel launch` starts a job: the `[launch]` table of a config file. Workers do not read it."""

    num_processes: int | None = _setting(
        None,
        "processes of the whole job, over all machines (default: what the backend wants: torch one per GPU, xla and jax one"
        " per machine)",
        kind="int",
        least=1,
    )
    num_machines: int = _setting(1, "machines of the job", least=1)
    machine_rank: int = _setting(0, "this machine, from 0")
    main_process_ip: str | None = _setting(None, "address of machine 0", kind="str")
    main_process_port: int | None = _setting(None, "free port on machine 0 (default: chosen)", kind="int", least=1)
    max_restarts: int = _setting(0, "how often the whole job is started again after a process failed")
    grace_s: int = _setting(15, "seconds between SIGTERM and SIGKILL when processes are stopped", least=1)
    gpu_ids: str = _setting("all", "GPUs of this machine, such as 0,1, or all")
    num_cpu_threads_per_process: int | None = _setting(
        None, "OMP_NUM_THREADS of every process (default: cores / processes, at least 1)", kind="int", least=1
    )
