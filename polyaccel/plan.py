"""What will be done: the Config after it met the real devices. Everything that can be refused is refused here, before work starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyaccel.config import Config
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import PlanError, UnsupportedError
from polyaccel.mesh import MeshSpec
from polyaccel.precision import PrecisionPolicy
from polyaccel.sharding.rules import ShardingRule
from polyaccel.topology import Topology

log = logging.getLogger("polyaccel.plan")

_EXCHANGE = "its compiler plans the exchange of gradients"
# Setting -> (the feature of a backend that honours it, what holds where there is none, whether numbers stay the same without it).
_OF_SOME_BACKENDS: Mapping[str, tuple[str, str, bool]] = {
    "autocast_cache": ("autocast_cache", "its programs cast a weight where they need it", True),
    "ddp_broadcast_buffers": ("ddp", "buffers of a model are those of the whole job", False),
    "ddp_bucket_cap_mb": ("ddp", _EXCHANGE, True),
    "ddp_find_unused_parameters": ("ddp", "parameters that a loss does not depend on need no search", True),
    "ddp_gradient_as_bucket_view": ("ddp", _EXCHANGE, True),
    "ddp_static_graph": ("ddp", _EXCHANGE, True),
    "ddp_comm_hook": ("ddp", _EXCHANGE, False),
    "ddp_comm_wrapper": ("ddp", _EXCHANGE, False),
    "ddp_comm_state_option": ("ddp", _EXCHANGE, False),
    "sharding_rules": ("sharding_rules", "it cuts no parameter by its name", False),
    "remat": ("remat", "it keeps what a backward pass needs", False),
    "offload": ("offload", "parameters and optimizer state stay on the devices", False),
    "process_group": ("process_group", "its processes do not meet through torch.distributed", True),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Mesh sizes, precision and batch arithmetic of a job, equal on all of its processes but for `first_data_shard`.

    A process feeds the data shards `first_data_shard .. first_data_shard + num_local_data_shards`; batch sizes of loaders are
    per data shard (or of the global batch with `split_batches`). Where the devices of one data shard belong to several processes
    (`num_processes_per_shard`, torch with a tensor axis), these are neighbours, and all of them feed that shard with the same batches.
    `remarks`: settings that have no effect on this backend.
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
    sharding_rules: tuple[ShardingRule, ...] = ()
    remarks: tuple[str, ...] = ()
    num_processes_per_shard: int = 1
    remat: str = "none"
    offload: str = "none"


def make_plan(
    config: Config,
    topology: Topology,
    *,
    backend: str,
    mesh_axes: frozenset[str],
    mixed_precision: frozenset[str],
    features: frozenset[str],
) -> Plan:
    """The plan of a config on these devices. Raises PlanError or UnsupportedError, naming the user's value and the way out."""
    for axis, size in config.mesh.sizes.items():
        if size != 1 and axis not in mesh_axes:
            raise UnsupportedError(
                f"mesh.{axis}={size}{_given_by(config, axis)} is not supported by backend {backend!r},"
                f" which shards over: {', '.join(sorted(mesh_axes))}",
                f"leave mesh.{axis} at 1, or choose another backend",
            )
    mesh = config.mesh.resolve(topology.num_devices)
    if config.mixed_precision not in mixed_precision:
        raise UnsupportedError(
            f"mixed_precision={config.mixed_precision!r} is not supported by backend {backend!r}",
            f"use one of: {', '.join(sorted(mixed_precision))}",
        )
    if config.compile and "compile" not in features:
        raise UnsupportedError(
            f"compile=True ({config.sources.get('compile', 'default')}) is a setting of torch.compile, and backend {backend!r}"
            " compiles every step already",
            "leave it out",
        )
    accumulation, said = _accumulation(config, mesh)
    remarks = [*config.remarks, *said, *_without_effect(config, backend, features)]
    first_data_shard, num_local, num_sharing = _feeding(mesh, topology)
    return Plan(
        mesh=mesh,
        precision=config.precision,
        gradient_accumulation_steps=accumulation,
        num_data_shards=mesh.num_data_shards,
        first_data_shard=first_data_shard,
        num_local_data_shards=num_local,
        split_batches=config.split_batches,
        even_batches=config.even_batches,
        partitioning=config.partitioning,
        compile=config.compile,
        compile_backend=config.compile_backend,
        sharding_rules=config.parameter_rules,
        remarks=tuple(remarks),
        num_processes_per_shard=num_sharing,
        remat=config.remat,
        offload=config.offload,
    )


def _accumulation(config: Config, mesh: MeshSpec) -> tuple[int, list[str]]:
    """Batches of a data shard per update, and what is to be said of them. Raises PlanError where the global batch cannot be kept."""
    whole, shards = config.micro_batches_per_update, mesh.num_data_shards
    if whole is None:
        return config.gradient_accumulation_steps, []
    given = f"micro_batches_per_update={whole} ({config.sources.get('micro_batches_per_update', 'default')})"
    if config.split_batches:
        raise PlanError(
            f"{given} with split_batches: a loader's batch is the global one already, on any number of devices",
            "leave one of the two out",
        )
    if whole % shards:
        raise PlanError(
            f"{given} cannot be kept on {shards} data shards: {whole} is not a multiple of {shards}",
            f"use a number of data shards that divides {whole}, or change the global batch",
        )
    steps = whole // shards
    source = config.sources.get("gradient_accumulation_steps")
    if source is None or config.gradient_accumulation_steps == steps:
        return steps, []
    replaced = f"gradient_accumulation_steps={config.gradient_accumulation_steps} ({source})"
    return steps, [f"{replaced} is {steps} on {shards} data shards, because of {given}"]


def _feeding(mesh: MeshSpec, topology: Topology) -> tuple[int, int, int]:
    """The first data shard that this process feeds, how many it feeds, and how many processes feed each of them.

    Devices fill the mesh in the order of their processes, and the axes that split the batch are its outermost: a shard's devices are
    neighbours. Raises PlanError where a process would feed a part of one shard and a part of another.
    """
    num_shards, num_processes = mesh.num_data_shards, topology.num_processes
    if num_shards % num_processes == 0:
        num_local = num_shards // num_processes
        return topology.process_index * num_local, num_local, 1
    if num_processes % num_shards == 0:
        num_sharing = num_processes // num_shards
        return topology.process_index // num_sharing, 1, num_sharing
    raise PlanError(
        f"{num_shards} data shards cannot be fed by {num_processes} processes in equal parts",
        "make replica x data x fsdp a multiple or a divisor of the number of processes",
    )


def _given_by(config: Config, axis: str) -> str:
    source = config.sources.get("mesh") or config.sources.get(f"mesh.{axis}")
    return f" ({source})" if source else ""


def say_remarks(plan: Plan, topology: Topology) -> None:
    """Log, on process 0, what of the script's settings has no effect here."""
    if topology.is_main_process:
        for remark in plan.remarks:
            log.warning("%s", remark)


def _without_effect(config: Config, backend: str, features: frozenset[str]) -> Iterator[str]:
    """A remark for every setting that changes no number and nothing else here. Raises UnsupportedError for one that would."""
    for name, (feature, why, is_harmless) in _OF_SOME_BACKENDS.items():
        value = getattr(config, name)
        if feature in features or value == SETTINGS[name].default:
            continue
        given = f"{name}={value!r} ({config.sources.get(name, 'default')})"
        if not is_harmless:
            raise UnsupportedError(f"{given} is not supported by backend {backend!r}: {why}", "leave it out")
        yield f"{given} has no effect on backend {backend!r}: {why}"
