"""The YAML of `accelerate config` is understood, or what cannot be is named with its line and the way out."""

import pytest

from polyaccel.config.files import read_file
from polyaccel.config.resolve import Gathered, config_of

CPU = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: no
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: true
"""


def read(folder, text):
    path = folder / "default_config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_file(path)


def test_a_cpu_configuration_of_two_processes(tmp_path):
    found = read(tmp_path, CPU)
    assert found.problems == []
    assert found.values == {
        "cpu": True,
        "debug": False,
        "mixed_precision": "no",
        "launch.machine_rank": 0,
        "launch.num_machines": 1,
        "launch.num_processes": 2,
    }
    assert found.sources["launch.num_processes"].endswith("default_config.yaml:11")


def test_fsdp_becomes_a_mesh(tmp_path):
    found = read(
        tmp_path,
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nfsdp_config:\n"
        "  fsdp_sharding_strategy: FULL_SHARD\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        "  fsdp_activation_checkpointing: true\n  fsdp_offload_params: true\n  fsdp_cpu_ram_efficient_loading: true\n",
    )
    assert found.problems == []
    config = config_of(Gathered(found.values, found.sources))
    assert (config.mesh.fsdp, config.mesh.data, config.mixed_precision) == (-1, 1, "bf16")
    assert (config.remat, config.offload) == ("full", "cpu")
    assert any("decided by the engine" in note for note in found.notes)


def test_what_is_said_of_dynamo_becomes_settings_of_compile(tmp_path):
    text = (
        "distributed_type: 'NO'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_mode: max-autotune\n"
        "  dynamo_use_dynamic: false\n  dynamo_use_fullgraph: true\n  dynamo_use_regional_compilation: true\n"
    )
    assert read(tmp_path, text).values == {
        "compile": True,
        "compile_backend": "inductor",
        "compile_mode": "max-autotune",
        "compile_dynamic": False,
        "compile_fullgraph": True,
        "compile_regions": True,
    }


def test_dynamo_becomes_compile_and_tpu_becomes_xla(tmp_path):
    assert read(tmp_path, "distributed_type: 'NO'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n").values == {
        "compile": True,
        "compile_backend": "inductor",
    }
    assert read(tmp_path, "distributed_type: XLA\nnum_processes: 8\n").values == {"backend": "xla"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("distributed_type: DEEPSPEED", "mesh.fsdp"),
        ("deepspeed_config:\n  zero_stage: 3", "mesh.fsdp"),
        ("distributed_type: MEGATRON_LM", "mesh.tensor"),
        ("mixed_precision: fp8", "is unknown"),
        ("compute_environment: AMAZON_SAGEMAKER", "not on SageMaker"),
        ("tpu_use_cluster: true", "--on tpu-pod"),
        ("num_proceses: 2", "did you mean 'num_processes'"),
        ("num_processes: two", "is not an integer"),
    ],
)
def test_what_has_no_counterpart_is_named_with_its_line(tmp_path, line, reason):
    found = read(tmp_path, f"main_training_function: main\ndistributed_type: 'NO'\n{line}\n")
    assert any(reason in problem and "default_config.yaml:" in problem for problem in found.problems), found.problems
