"""Accelerate's settings objects: each of their fields is a setting, with the precedence of an argument where it was given."""

import copy
import inspect
from dataclasses import fields
from datetime import timedelta
from types import SimpleNamespace

import pytest

import polyaccel.utils
from polyaccel import (
    Accelerator,
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ParallelismConfig,
    ProfileKwargs,
)
from polyaccel.config import absent
from polyaccel.config.arguments import config_of_arguments
from polyaccel.config.parallel import TorchTensorParallelPlugin
from polyaccel.config.resolve import environment_for, gather, resolve
from polyaccel.config.settings import SETTINGS
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.mesh import MeshSpec
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend
from polyaccel.utils import GradientAccumulationPlugin, PrecisionType, RNGType, TorchDynamoPlugin

register_backend(FakeBackend())


def test_every_field_of_a_settings_object_is_a_setting_with_the_same_default():
    for field in fields(DataLoaderConfiguration):
        assert SETTINGS[field.name].default == field.default, field.name
    for field in fields(GradientAccumulationPlugin):
        if field.name != "num_steps":
            assert SETTINGS[field.name].default == field.default, field.name


def test_a_settings_object_reaches_the_config_with_the_source_of_an_argument():
    accelerator = Accelerator(
        backend="fake",
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False),
    )
    assert accelerator.split_batches
    assert not accelerator.plan.even_batches
    assert accelerator.gradient_accumulation_steps == 3
    assert not accelerator.gradient_state.sync_with_dataloader
    assert accelerator.config.sources["split_batches"] == "argument dataloader_config"


def test_a_field_that_was_left_alone_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("POLYACCEL_EVEN_BATCHES", "false")
    monkeypatch.setenv("POLYACCEL_SPLIT_BATCHES", "true")
    assert not config_of_arguments({"dataloader_config": DataLoaderConfiguration(split_batches=False)}).even_batches
    assert not config_of_arguments({"dataloader_config": DataLoaderConfiguration(split_batches=False)}).split_batches
    assert config_of_arguments({"dataloader_config": DataLoaderConfiguration(even_batches=True)}).even_batches
    later = DataLoaderConfiguration()
    later.split_batches = False
    later.even_batches = True
    assert not config_of_arguments({"dataloader_config": later}).even_batches  # as a default, it says nothing


def test_a_settings_object_and_an_argument_may_not_contradict_each_other():
    config = config_of_arguments({"split_batches": True, "dataloader_config": DataLoaderConfiguration(True)})
    assert config.split_batches
    with pytest.raises(ConfigError, match="split_batches=False contradicts dataloader_config") as caught:
        Accelerator(split_batches=False, dataloader_config=DataLoaderConfiguration(split_batches=True))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=r"steps=2 contradicts gradient_accumulation_plugin, which says .*=4"):
        Accelerator(gradient_accumulation_steps=2, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4))
    with pytest.raises(ConfigError, match="dataloader_config is a dict"):
        Accelerator(dataloader_config={"split_batches": True})


def test_an_impossible_value_is_named():
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=0 must be at least 1"):
        Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=0))
    with pytest.raises(ConfigError, match="data_seed='now' is not an integer"):
        Accelerator(dataloader_config=DataLoaderConfiguration(data_seed="now"))


def test_copies_keep_what_differs_and_kwargs_are_only_that():
    plugin = GradientAccumulationPlugin(4, adjust_scheduler=True)
    assert plugin.to_kwargs() == {"num_steps": 4}
    assert plugin.given() == {"num_steps": 4, "adjust_scheduler": True}
    assert copy.deepcopy(plugin).given() == {"num_steps": 4, "adjust_scheduler": True}
    assert plugin.to_dict() == {
        "num_steps": 4,
        "adjust_scheduler": True,
        "sync_with_dataloader": True,
        "sync_each_batch": False,
    }


def test_at_most_one_handler_of_each_class_and_only_handlers_that_mean_something():
    with pytest.raises(ConfigError, match="two AutocastKwargs"):
        Accelerator(backend="fake", kwargs_handlers=[AutocastKwargs(), AutocastKwargs(enabled=False)])
    with pytest.raises(ConfigError, match="kwargs_handlers has a dict"):
        Accelerator(backend="fake", kwargs_handlers=[{}])


def test_every_handler_names_settings():
    config = config_of_arguments(
        {
            "kwargs_handlers": [
                AutocastKwargs(enabled=False, cache_enabled=False),
                GradScalerKwargs(init_scale=8, growth_interval=5, enabled=False),
                DistributedDataParallelKwargs(
                    bucket_cap_mb=15,
                    find_unused_parameters=True,
                    comm_hook=DDPCommunicationHookType.POWER_SGD,
                    comm_state_option={"matrix_approximation_rank": 2},
                ),
                InitProcessGroupKwargs(backend="gloo", timeout=timedelta(minutes=2)),
                ProfileKwargs(record_shapes=True),
            ]
        }
    )
    named = {name: getattr(config, name) for name in config.sources}
    assert named == {
        "autocast": False,
        "autocast_cache": False,
        "loss_scaling": False,
        "loss_scaling_init_scale": 8.0,
        "loss_scaling_growth_interval": 5,
        "ddp_bucket_cap_mb": 15,
        "ddp_find_unused_parameters": True,
        "ddp_comm_hook": "power_sgd",
        "ddp_comm_state_option": {"matrix_approximation_rank": 2},
        "process_group": "gloo",
        "timeout_s": 120,
    }
    assert config.sources["timeout_s"] == "argument InitProcessGroupKwargs"


def test_kwargs_of_a_handler_are_what_differs_from_its_defaults():
    assert DistributedDataParallelKwargs(static_graph=True, comm_hook="fp16").to_kwargs() == {"static_graph": True}
    assert AutocastKwargs(enabled=True).to_kwargs() == {}
    assert ProfileKwargs(with_stack=True).to_kwargs() == {"with_stack": True}
    assert TorchDynamoPlugin(backend="eager", use_regional_compilation=True).to_kwargs() == {"backend": "eager"}


def test_accelerates_variables_fill_what_an_object_leaves_open(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "4")
    assert TorchDynamoPlugin().to_kwargs() == {"backend": "aot_eager", "fullgraph": True}
    assert TorchDynamoPlugin(backend="eager", fullgraph=False).to_kwargs() == {"backend": "eager"}
    config = config_of_arguments({})
    assert (config.compile, config.compile_backend, config.compile_fullgraph) == (True, "aot_eager", True)
    assert config.sources["compile"] == "environment ACCELERATE_DYNAMO_BACKEND"
    assert not config_of_arguments({"dynamo_backend": "no"}).compile
    assert config_of_arguments({"parallelism_config": ParallelismConfig()}).mesh == MeshSpec(data=1, tensor=4)


def test_a_plugin_that_says_nothing_of_the_backend_leaves_it_to_the_environment(monkeypatch):
    monkeypatch.setenv("POLYACCEL_COMPILE", "true")
    assert config_of_arguments({"dynamo_plugin": TorchDynamoPlugin(mode="max-autotune")}).compile


def test_accelerates_other_variables_mean_settings_and_arguments_count_more():
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }
    config = resolve({"gradient_accumulation_steps": 2}, environment)
    assert (config.cpu, config.mixed_precision, config.gradient_accumulation_steps) == (True, "bf16", 2)
    assert not config.compile
    assert resolve({}, {**environment, "POLYACCEL_MIXED_PRECISION": "no"}).mixed_precision == "no"


@pytest.mark.parametrize(
    ("sizes", "mesh"),
    [
        ({}, MeshSpec()),
        ({"dp_replicate_size": 8}, MeshSpec(data=8)),
        ({"dp_shard_size": 4}, MeshSpec(data=1, fsdp=4)),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, MeshSpec(data=2, fsdp=4)),
        ({"dp_shard_size": 2, "tp_size": 2, "cp_size": 2}, MeshSpec(data=1, fsdp=2, tensor=2, sequence=2)),
        ({"sp_size": 2}, MeshSpec(data=1, sequence=2)),
    ],
)
def test_a_parallelism_config_is_a_mesh(sizes, mesh):
    assert config_of_arguments({"parallelism_config": ParallelismConfig(**sizes)}).mesh == mesh


def test_an_axis_that_a_backend_does_not_have_is_refused_with_the_argument_that_asked_for_it():
    for argument, value in (
        ("fsdp_plugin", FullyShardedDataParallelPlugin()),
        ("parallelism_config", ParallelismConfig(tp_size=2)),
    ):
        with pytest.raises(UnsupportedError, match=rf"mesh\.\w+=-?\d \(argument {argument}\) is not supported"):
            Accelerator(backend="fake", **{argument: value})


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="tp_size=0"):
        ParallelismConfig(tp_size=0)
    with pytest.raises(ConfigError, match="both split sequences"):
        ParallelismConfig(cp_size=2, sp_size=2)
    with pytest.raises(ConfigError, match="contradicts parallelism_config"):
        Accelerator(mesh={"data": 2}, parallelism_config=ParallelismConfig(dp_shard_size=2))


def test_the_fsdp_plugin_is_a_mesh_and_what_it_leaves_to_the_engine_is_said(caplog):
    plugin = FullyShardedDataParallelPlugin(sharding_strategy="FULL_SHARD", use_orig_params=True)
    config = config_of_arguments({"fsdp_plugin": plugin})
    assert config.mesh == MeshSpec(data=1, fsdp=-1)
    assert config.remarks == ("fsdp_plugin: use_orig_params: no effect, the engine decides",)
    shared = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)}
    sizes = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    assert config_of_arguments({**shared, "parallelism_config": sizes}).mesh == MeshSpec(data=2, fsdp=4)
    assert config_of_arguments({**shared, "mesh": {"fsdp": 2, "data": 1}}).mesh == MeshSpec(data=1, fsdp=2)
    assert config_of_arguments({"fsdp_plugin": FullyShardedDataParallelPlugin(sharding_strategy=3)}).mesh == MeshSpec()
    Accelerator(backend="fake", fsdp_plugin=FullyShardedDataParallelPlugin(sharding_strategy=3, use_orig_params=True))
    assert "use_orig_params: no effect" in caplog.text


class CPUOffloadPolicy:
    """As torch.distributed.fsdp has it: known by its name."""


@pytest.mark.parametrize("offload", [True, SimpleNamespace(offload_params=True), CPUOffloadPolicy()])
def test_checkpointed_activations_and_offload_of_the_fsdp_plugin_are_settings(offload):
    plugin = FullyShardedDataParallelPlugin(activation_checkpointing=True, cpu_offload=offload)
    config = config_of_arguments({"fsdp_plugin": plugin, "mesh": {"fsdp": 2, "tensor": 2}})
    assert (config.remat, config.offload, config.mesh.fsdp) == ("full", "cpu", 2)
    without = FullyShardedDataParallelPlugin(cpu_offload=SimpleNamespace(offload_params=False))
    assert config_of_arguments({"fsdp_plugin": without}).offload == "none"
    with pytest.raises(UnsupportedError, match="offload='cpu'"):
        Accelerator(
            backend="fake", fsdp_plugin=FullyShardedDataParallelPlugin(sharding_strategy=3, cpu_offload=offload)
        )


def test_the_plugin_of_tensor_parallelism_is_a_mesh_and_shares_it_with_that_of_fsdp():
    layers = {"torch_tp_plugin": TorchTensorParallelPlugin(tp_size=2)}
    assert config_of_arguments(layers).mesh == MeshSpec(data=-1, tensor=2)
    both = {**layers, "fsdp_plugin": FullyShardedDataParallelPlugin()}
    assert config_of_arguments(both).mesh == MeshSpec(data=1, fsdp=-1, tensor=2)
    sizes = {"parallelism_config": ParallelismConfig(dp_shard_size=4, tp_size=2)}
    assert config_of_arguments({**both, **sizes}).mesh == MeshSpec(data=1, fsdp=4, tensor=2)
    assert config_of_arguments({"torch_tp_plugin": TorchTensorParallelPlugin()}).mesh == MeshSpec()
    with pytest.raises(ConfigError, match="contradicts torch_tp_plugin"):
        config_of_arguments({**layers, "mesh": {"data": 2, "tensor": 4}})
    with pytest.raises(ConfigError, match="tp_size=0"):
        config_of_arguments({"torch_tp_plugin": TorchTensorParallelPlugin(tp_size=0)})
    with pytest.raises(UnsupportedError, match="torch_device_mesh"):
        config_of_arguments({"torch_tp_plugin": TorchTensorParallelPlugin(2, torch_device_mesh=object())})
    with pytest.raises(ConfigError, match="torch_tp_plugin is a object"):
        config_of_arguments({"torch_tp_plugin": object()})


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("sharding_strategy", "HYBRID_SHARD", "mesh={'data': hosts"),
        ("reshard_after_forward", False, "mesh={'fsdp': -1}"),
        ("ignored_modules", ["head"], "repeated"),
        ("mixed_precision_policy", "bf16", "mixed_precision='bf16'"),
    ],
)
def test_what_sharding_here_cannot_do_is_refused_with_what_to_use(field, value, hint):
    with pytest.raises(UnsupportedError, match=f"{field}=") as caught:
        Accelerator(backend="fake", fsdp_plugin=FullyShardedDataParallelPlugin(**{field: value}))
    assert hint in caught.value.hint


@pytest.mark.parametrize("argument", ["deepspeed_plugin", "deepspeed_plugins", "megatron_lm_plugin"])
def test_plugins_of_absent_engines_are_refused_and_the_mesh_is_named(argument):
    with pytest.raises(UnsupportedError, match=argument) as caught:
        Accelerator(backend="fake", **{argument: object()})
    assert "mesh" in caught.value.hint


@pytest.mark.parametrize("name", absent.__all__)
def test_settings_of_absent_libraries_can_be_imported_and_not_made(name):
    with pytest.raises(UnsupportedError, match=name):
        getattr(polyaccel.utils, name)()


def test_fp8_is_refused_and_bf16_is_named():
    with pytest.raises(UnsupportedError, match="mixed_precision='fp8'") as caught:
        Accelerator(backend="fake", mixed_precision="fp8")
    assert "bf16" in caught.value.hint


def test_a_backend_without_ddp_says_which_settings_have_no_effect_and_refuses_those_that_would_change_numbers(caplog):
    Accelerator(backend="fake", kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=15)])
    assert (
        "ddp_bucket_cap_mb=15 (argument DistributedDataParallelKwargs) has no effect on backend 'fake'" in caplog.text
    )
    for settings in ({"comm_hook": "fp16"}, {"broadcast_buffers": False}):
        with pytest.raises(UnsupportedError, match=r"ddp_.* is not supported by backend 'fake'"):
            Accelerator(backend="fake", kwargs_handlers=[DistributedDataParallelKwargs(**settings)])


def test_a_scale_that_cannot_be_is_refused_before_anything_is_opened():
    with pytest.raises(ConfigError, match="loss_scaling_growth_factor="):
        Accelerator(backend="fake", kwargs_handlers=[GradScalerKwargs(growth_factor=0.5)])


def test_options_of_a_compiler_are_a_table_in_files_and_json_in_the_environment(tmp_path):
    file = tmp_path / "settings.toml"
    for text in ("compile_options = { max_autotune = true }", "[compile_options]\nmax_autotune = true"):
        file.write_text(text)
        assert resolve({}, {"POLYACCEL_CONFIG_FILE": str(file)}).compile_options == {"max_autotune": True}
    other = tmp_path / "settings.yaml"
    other.write_text("compile_options:\n  max_autotune: true\n  level: 2\n")
    gathered = gather({"POLYACCEL_CONFIG_FILE": str(other)})
    assert gathered.values["compile_options"] == {"max_autotune": True, "level": 2}
    variables = environment_for(gathered, launched="torch")
    assert resolve({}, variables).compile_options == {"max_autotune": True, "level": 2}
    for text in ("max_autotune", "[1]", '{"a": [1]}'):
        with pytest.raises(ConfigError, match="POLYACCEL_COMPILE_OPTIONS"):
            resolve({}, {"POLYACCEL_COMPILE_OPTIONS": text})


def test_members_of_accelerates_enums_are_what_they_stand_for():
    config = config_of_arguments({"mixed_precision": PrecisionType.BF16, "rng_types": [RNGType.TORCH]})
    assert (config.mixed_precision, config.rng_types) == ("bf16", ("torch",))


def test_the_constructor_has_every_argument_of_accelerates():
    theirs = """device_placement split_batches mixed_precision gradient_accumulation_steps cpu dataloader_config
        deepspeed_plugin fsdp_plugin torch_tp_plugin megatron_lm_plugin rng_types log_with project_dir project_config
        gradient_accumulation_plugin step_scheduler_with_optimizer kwargs_handlers dynamo_backend dynamo_plugin
        deepspeed_plugins parallelism_config"""
    assert set(theirs.split()) <= inspect.signature(Accelerator).parameters.keys()
