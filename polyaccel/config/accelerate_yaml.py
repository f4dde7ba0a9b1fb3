"""Reads the YAML that `accelerate config` writes as polyaccel settings. What has no meaning here is refused, never dropped.

The keys are those of Accelerate 1.15 (ClusterConfig and the tables under it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from polyaccel.errors import nearest

_OFF = frozenset({"", "no", "none", "null", "false", "0", "~"})


@dataclass(slots=True)
class Answer:
    """What one key of the file means here: settings as texts, mistakes, remarks."""

    settings: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_accelerate(names: Iterable[str]) -> bool:
    """True of the keys of a file that `accelerate config` wrote: polyaccel has no such settings."""
    return not {"compute_environment", "distributed_type"}.isdisjoint(names)


def translate(texts: Mapping[str, str]) -> dict[str, Answer]:
    """What every key of such a file means, by key."""
    kind = texts.get("distributed_type", "NO").upper()
    return {key: _answer(key, text, kind) for key, text in texts.items()}


def _answer(key: str, text: str, kind: str) -> Answer:
    section, _, inner = key.partition(".")
    if key == "num_processes" and kind in ("XLA", "TPU"):
        return Answer(notes=["num_processes counts TPU cores there; here a machine has one process for all of them"])
    if key in _SAME:
        return Answer({_SAME[key]: text})
    if key == "distributed_type":
        return _distributed(kind)
    if key in _NEUTRAL:
        return (
            Answer()
            if _NEUTRAL[key](text)
            else Answer(problems=[f"{key}={text!r} has no counterpart here: {_WHY[key]}"])
        )
    if section in _REFUSED:
        return Answer() if _off(text) else Answer(problems=[f"{key}={text!r} is not supported: {_REFUSED[section]}"])
    if section == "fsdp_config":
        return (
            _fsdp(inner, text) if kind == "FSDP" else Answer(notes=[f"{key} has no effect: distributed_type is {kind}"])
        )
    if section == "dynamo_config":
        return _dynamo(inner, text)
    known = [*_SAME, *_NEUTRAL, *_REFUSED, "distributed_type", "fsdp_config", "parallelism_config", "dynamo_config"]
    return Answer(problems=[f"{key} is no key of an Accelerate configuration: {nearest(key, known)}"])


def _distributed(kind: str) -> Answer:
    if kind in _KINDS:
        return Answer(dict(_KINDS[kind]))
    why = _REFUSED.get(kind.lower() + "_config", "no engine here is of that kind")
    return Answer(problems=[f"distributed_type={kind!r} is not supported: {why}"])


def _fsdp(key: str, text: str) -> Answer:
    if key == "fsdp_sharding_strategy" and text.upper() not in ("FULL_SHARD", "1"):
        return Answer(
            problems=[
                f"fsdp_sharding_strategy={text!r} is written as mesh axes here: HYBRID_SHARD is mesh.data x mesh.fsdp,"
                " NO_SHARD is mesh.data, and SHARD_GRAD_OP has no counterpart"
            ]
        )
    if key in _FSDP_SETTINGS:
        return Answer({} if _off(text) else dict(_FSDP_SETTINGS[key]))
    if key in _FSDP_ENGINE:
        return Answer(notes=[f"fsdp_config.{key} is decided by the engine"])
    if _off(text) or key == "fsdp_sharding_strategy":
        return Answer()
    return Answer(problems=[f"fsdp_config.{key}={text!r} has no counterpart here: leave it out, or at its default"])


def _dynamo(key: str, text: str) -> Answer:
    if key == "dynamo_backend":
        return Answer() if _off(text) else Answer({"compile": "true", "compile_backend": text.lower()})
    if key in _DYNAMO:
        return Answer() if text == "" else Answer({_DYNAMO[key]: text.lower()})
    if _off(text) or text.lower() == "default":
        return Answer()
    return Answer(problems=[f"dynamo_config.{key}={text!r} has no counterpart here: leave it out, or at its default"])


def _any(text: str) -> bool:
    return True


def _off(text: str) -> bool:
    return text.lower() in _OFF


_KINDS: Mapping[str, Mapping[str, str]] = {
    "NO": {},
    "MULTI_GPU": {},
    "MULTI_CPU": {"cpu": "true"},
    "FSDP": {"mesh.fsdp": "-1"},
    "XLA": {"backend": "xla"},
    "TPU": {"backend": "xla"},
}
_SAME = {
    "mixed_precision": "mixed_precision",
    "use_cpu": "cpu",
    "debug": "debug",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_processes": "launch.num_processes",
    "num_machines": "launch.num_machines",
    "machine_rank": "launch.machine_rank",
    "main_process_ip": "launch.main_process_ip",
    "main_process_port": "launch.main_process_port",
    "gpu_ids": "launch.gpu_ids",
    "parallelism_config.parallelism_config_dp_replicate_size": "mesh.data",
    "parallelism_config.parallelism_config_dp_shard_size": "mesh.fsdp",
    "parallelism_config.parallelism_config_tp_size": "mesh.tensor",
    "parallelism_config.parallelism_config_cp_size": "mesh.sequence",
}
_DYNAMO = {
    "dynamo_mode": "compile_mode",
    "dynamo_use_fullgraph": "compile_fullgraph",
    "dynamo_use_dynamic": "compile_dynamic",
    "dynamo_use_regional_compilation": "compile_regions",
}
# Keys without a setting of ours: the values that mean what polyaccel does anyway.
_NEUTRAL: Mapping[str, Callable[[str], bool]] = {
    "compute_environment": lambda text: text == "LOCAL_MACHINE",
    "rdzv_backend": lambda text: text in ("static", "c10d"),
    "same_network": _any,
    "main_training_function": _any,
    "enable_cpu_affinity": _off,
    "downcast_bf16": _off,
    "tpu_use_cluster": _off,
    "tpu_use_sudo": _off,
    "tpu_env": _off,
    "tpu_vm": _off,
    "tpu_name": _off,
    "tpu_zone": _off,
    "commands": _off,
    "command_file": _off,
    "parallelism_config.parallelism_config_cp_comm_strategy": _any,
    "parallelism_config.parallelism_config_cp_backend": _any,
    "parallelism_config.parallelism_config_sp_size": lambda text: text in ("", "1"),
}
_POD = "a TPU pod is started with `polyaccel launch --on tpu-pod`"
_WHY: Mapping[str, str] = {
    "compute_environment": "jobs are started on this machine or on a cluster, not on SageMaker",
    "rdzv_backend": "machines meet at main_process_ip",
    "enable_cpu_affinity": "bind processes with numactl or the scheduler",
    "downcast_bf16": "parameters stay float32; mixed_precision: bf16 computes in bfloat16",
    "tpu_use_cluster": _POD,
    "tpu_use_sudo": _POD,
    "tpu_env": _POD,
    "tpu_vm": _POD,
    "tpu_name": _POD,
    "tpu_zone": _POD,
    "commands": _POD,
    "command_file": _POD,
    "parallelism_config.parallelism_config_sp_size": "that is DeepSpeed's; use mesh.sequence",
}
_REFUSED: Mapping[str, str] = {
    "deepspeed_config": "shard with the mesh instead (mesh.fsdp: -1)",
    "megatron_lm_config": "use the mesh instead (mesh.tensor, mesh.fsdp, and mesh.sequence on an engine that has it)",
    "fp8_config": "use mixed_precision: bf16",
    "mpirun_config": "start the script with mpirun itself: its processes are recognised",
}
_FSDP_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "fsdp_activation_checkpointing": {"remat": "full"},
    "fsdp_offload_params": {"offload": "cpu"},
}
_FSDP_ENGINE = frozenset(
    {
        "fsdp_version",
        "fsdp_auto_wrap_policy",
        "fsdp_transformer_layer_cls_to_wrap",
        "fsdp_backward_prefetch",
        "fsdp_backward_prefetch_policy",
        "fsdp_forward_prefetch",
        "fsdp_use_orig_params",
        "fsdp_sync_module_states",
        "fsdp_state_dict_type",
        "fsdp_reshard_after_forward",
        "fsdp_min_num_params",
        "fsdp_cpu_ram_efficient_loading",
    }
)
