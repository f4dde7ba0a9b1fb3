"""`accelerate.utils.imports`: which packages are installed, and what the devices of torch can do.

A package is looked for without importing it; a question about devices imports torch, where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # no parent package; a module that somebody made without a spec
        return False


def _installed(*names: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return all(_is_installed(name) for name in names)

    is_available.__doc__ = f"Whether {' and '.join(names)} is installed."
    return is_available


is_aim_available = _installed("aim")
is_bnb_available = _installed("bitsandbytes")
is_boto3_available = _installed("boto3")
is_clearml_available = _installed("clearml")
is_comet_ml_available = _installed("comet_ml")
is_datasets_available = _installed("datasets")
is_deepspeed_available = _installed("deepspeed")
is_dvclive_available = _installed("dvclive")
is_import_timer_available = _installed("import_timer")
is_lomo_available = _installed("lomo_optim")
is_megatron_lm_available = _installed("megatron")
is_matplotlib_available = _installed("matplotlib")
is_mlflow_available = _installed("mlflow")
is_msamp_available = _installed("msamp")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_pynvml_available = _installed("pynvml")
is_pytest_available = _installed("pytest")
is_rich_available = _installed("rich")
is_sagemaker_available = _installed("sagemaker")
is_schedulefree_available = _installed("schedulefree")
is_swanlab_available = _installed("swanlab")
is_timm_available = _installed("timm")
is_torchao_available = _installed("torchao")
is_torchdata_available = _installed("torchdata")
is_torchdata_stateful_dataloader_available = _installed("torchdata", "torchdata.stateful_dataloader")
is_torchvision_available = _installed("torchvision")
is_tqdm_available = _installed("tqdm")
is_trackio_available = _installed("trackio")
is_transformer_engine_available = _installed("transformer_engine")
is_transformers_available = _installed("transformers")
is_triton_available = _installed("triton")
is_wandb_available = _installed("wandb")


def is_pippy_available() -> bool:
    """False: polyaccel builds no pipelines (see `prepare_pippy`)."""
    return False


def is_tensorboard_available() -> bool:
    """Whether tensorboard or tensorboardX is installed."""
    return _is_installed("tensorboard") or _is_installed("tensorboardX")


def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Whether torch_xla is installed; with a check also whether its device is a TPU, or a GPU (which starts its runtime)."""
    if not _is_installed("torch_xla"):
        return False
    if not (check_is_tpu or check_is_gpu):
        return True
    kind = str(_module("torch_xla.runtime").device_type()).upper()
    return (check_is_tpu and kind == "TPU") or (check_is_gpu and kind in {"GPU", "CUDA"})


def _module(name: str) -> Any:
    return import_module(name)


def _device_module(name: str) -> Any:
    """`torch.cuda`, `torch.npu`, ...: None without torch, or where this torch has no such device."""
    torch = _module("torch") if _is_installed("torch") else None
    return getattr(torch, name, None)


def _has_device(name: str) -> bool:
    module = _device_module(name)
    return module is not None and hasattr(module, "is_available") and bool(module.is_available())


def is_cuda_available() -> bool:
    """Whether torch sees a CUDA (or ROCm) device."""
    return _has_device("cuda")


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether torch sees an Apple GPU; every torch that polyaccel runs with is newer than any `min_version` in use."""
    return _has_device("mps")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Intel GPU."""
    return _has_device("xpu")


def is_npu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Ascend NPU."""
    return _has_device("npu")


def is_mlu_available(check_device: bool = False) -> bool:
    """Whether torch sees a Cambricon MLU."""
    return _has_device("mlu")


def is_musa_available(check_device: bool = False) -> bool:
    """Whether torch sees a Moore Threads GPU."""
    return _has_device("musa")


def is_sdaa_available(check_device: bool = False) -> bool:
    """Whether torch sees a Tecorigin SDAA device."""
    return _has_device("sdaa")


def is_hpu_available(init_hccl: bool = False) -> bool:
    """Whether torch sees an Intel Gaudi."""
    return _has_device("hpu")


def is_habana_gaudi1() -> bool:
    """Whether torch sees an Intel Gaudi of the first generation."""
    return is_hpu_available() and str(_device_module("hpu").get_device_name()).upper() == "GAUDI"


def is_neuron_available(check_device: bool = False) -> bool:
    """Whether torch sees an AWS Neuron core."""
    return _has_device("neuron")


def is_rocm_available() -> bool:
    """Whether torch was built for ROCm and sees a device."""
    version = _device_module("version")
    return is_cuda_available() and getattr(version, "hip", None) is not None


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether this machine's devices compute in bfloat16: CPUs and TPUs do, a GPU of CUDA from compute capability 8 on."""
    if is_torch_xla_available(check_is_tpu=True):
        return not ignore_tpu
    return bool(_device_module("cuda").is_bf16_supported()) if is_cuda_available() else True


def is_fp16_available() -> bool:
    """Whether Accelerator(mixed_precision="fp16") trains here with torch: on a GPU."""
    return any(_has_device(name) for name in ("cuda", "xpu", "npu", "mps"))


def is_fp8_available() -> bool:
    """Whether a library for 8-bit training is installed."""
    return is_transformer_engine_available() or is_torchao_available() or is_msamp_available()


def is_transformer_engine_mxfp8_available() -> bool:
    """Whether transformer_engine is installed and this GPU has its block-scaled 8-bit format."""
    if not is_transformer_engine_available():
        return False
    return bool(_module("transformer_engine.pytorch.fp8").check_mxfp8_support()[0])


def check_cuda_fp8_capability() -> bool:
    """Whether torch sees a CUDA GPU with 8-bit floating point: compute capability 8.9 or newer."""
    return is_cuda_available() and tuple(_device_module("cuda").get_device_capability()) >= (8, 9)
