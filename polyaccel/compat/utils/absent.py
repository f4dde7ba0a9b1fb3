"""Names of `accelerate.utils` that belong to libraries which are no engine here: importing one says what to use instead."""

from __future__ import annotations

from typing import NoReturn

from polyaccel.config.absent import ARGUMENTS
from polyaccel.errors import UnsupportedError

_FAMILIES = (
    (
        "DeepSpeed",
        ARGUMENTS["deepspeed_plugin"],
        "DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedSchedulerWrapper HfDeepSpeedConfig compile_regions_deepspeed"
        " deepspeed_required get_active_deepspeed_plugin map_pytorch_optim_to_deepspeed prepare_deepspeed_cmd_env",
    ),
    (
        "Megatron-LM",
        ARGUMENTS["megatron_lm_plugin"],
        "AbstractTrainStep BertTrainStep GPTTrainStep T5TrainStep MegatronEngine MegatronLMDummyDataLoader"
        " MegatronLMOptimizerWrapper MegatronLMSchedulerWrapper add_model_config_to_megatron_parser"
        " avg_losses_across_data_parallel_group gather_across_data_parallel_groups"
        " megatron_lm_initialize megatron_lm_prepare_data_loader megatron_lm_prepare_model_optimizer_scheduler"
        " megatron_lm_prepare_optimizer megatron_lm_prepare_scheduler",
    ),
    (
        "Amazon SageMaker",
        "start the job with `polyaccel launch` on its machines (docs/launching.md)",
        "SageMakerDistributedType prepare_sagemager_args_inputs",
    ),
    (
        "8-bit floating point",
        "use mixed_precision='bf16'",
        "apply_fp8_autowrap contextual_fp8_autocast convert_model convert_model_to_fp8_ao"
        " filter_first_and_last_linear_layers has_ao_layers has_transformer_engine_layers torchao_required",
    ),
    (
        "the inside of Accelerate's FSDP",
        "use Accelerator(mesh={'fsdp': n}), save_state and load_state; weights in one file: accelerator.save_model, or"
        " `polyaccel checkpoint convert`",
        "compile_regions_fsdp2 disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading ensure_weights_retied"
        " fsdp2_apply_ac fsdp2_canonicalize_names fsdp2_load_full_state_dict fsdp2_prepare_model"
        " fsdp2_switch_optimizer_parameters get_fsdp2_grad_scaler load_fsdp_model load_fsdp_optimizer merge_fsdp_weights"
        " save_fsdp_model save_fsdp_optimizer",
    ),
    (
        "the inside of `accelerate launch`",
        "use `polyaccel launch`, notebook_launcher or debug_launcher",
        "PrepareForLaunch TORCH_LAUNCH_PARAMS _filter_args prepare_multi_gpu_env prepare_simple_launcher_cmd_env prepare_tpu",
    ),
    (
        "pickled files",
        "use accelerator.save and accelerator.save_state, which write safetensors, and safetensors.torch.load_file",
        "load OPTIMIZER_NAME RNG_STATE_NAME SAMPLER_NAME SCALER_NAME SCHEDULER_NAME",
    ),
)
NAMES = {name: (family, instead) for family, instead, names in _FAMILIES for name in names.split()}


def refuse(name: str) -> NoReturn:
    """Raises UnsupportedError for one of `NAMES`."""
    family, instead = NAMES[name]
    raise UnsupportedError(f"polyaccel.utils.{name} is of {family}, which is not supported", instead)
