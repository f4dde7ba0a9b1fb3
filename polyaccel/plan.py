"""What will be done: the Config after it met the real devices. Everything that can be refused is refused here, before work starts."""

from __future__ import annotations

from dataclasses import dataclass

from polyaccel.config import Config
from polyaccel.errors import PlanError, UnsupportedError
from polyaccel.mesh import MeshSpec
from polyaccel.precision import PrecisionPolicy
from polyaccel.topology import Topology


@dataclass(frozen=True, slots=True)
class Plan:
    """Mesh sizes, precision and batch arithmetic of a job, equal on all of its processes but for `first_data_shard`.

    A process feeds the data shards `first_data_shard .. first_data_shard + num_local_data_shards`; batch sizes of loaders are
    per data shard (or of the global batch with `split_batches`).
    """

    mesh: MeshSpec
    precision: PrecisionPolicy
    gradient_accumulation_steps: int
    num_data_shards: int
    first_data_shard: int
    num_local_data_shards: int
    split_batches: bool
    even_batches: bool
    partitioning: str
    compile: bool
    compile_backend: str


def make_plan(
    config: Config,
    topology: Topology,
    *,
    backend: str,
    mesh_axes: frozenset[str],
    mixed_precision: frozenset[str],
    can_compile: bool,
) -> Plan:
    """The plan of a config on these devices. Raises PlanError or UnsupportedError, naming the user's value and the way out."""
    for axis, size in config.mesh.sizes.items():
        if size != 1 and axis not in mesh_axes:
            raise UnsupportedError(
                f"mesh.{axis}={size} is not supported by backend {backend!r}, which shards over: {', '.join(sorted(mesh_axes))}",
                f"leave mesh.{axis} at 1, or choose another backend",
            )
    mesh = config.mesh.resolve(topology.num_devices)
    if config.mixed_precision not in mixed_precision:
        raise UnsupportedError(
            f"mixed_precision={config.mixed_precision!r} is not supported by backend {backend!r}",
            f"use one of: {', '.join(sorted(mixed_precision))}",
        )
    if config.compile and not can_compile:
        raise UnsupportedError(
            f"compile=True is a setting of torch.compile, and backend {backend!r} compiles every step already",
            "leave compile out",
        )
    if mesh.num_data_shards % topology.num_processes:
        raise PlanError(
            f"{mesh.num_data_shards} data shards cannot be fed by {topology.num_processes} processes in equal parts",
            "make replica x data x fsdp a multiple of the number of processes",
        )
    num_local = mesh.num_data_shards // topology.num_processes
    return Plan(
        mesh=mesh,
        precision=config.precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_data_shards=mesh.num_data_shards,
        first_data_shard=topology.process_index * num_local,
        num_local_data_shards=num_local,
        split_batches=config.split_batches,
        even_batches=config.even_batches,
        partitioning=config.partitioning,
        compile=config.compile,
        compile_backend=config.compile_backend,
    )
