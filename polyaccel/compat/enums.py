"""Accelerate's enums, apart from the modules that offer them: both the state classes and the utilities need them."""

from __future__ import annotations

import enum


class DistributedType(str, enum.Enum):  # noqa: UP042 - str() of a StrEnum would be "NO", where Accelerate's is "DistributedType.NO"
    """How a job is spread over processes and devices.

    polyaccel's jobs are NO, MULTI_CPU, MULTI_GPU, MULTI_NPU, MULTI_XPU, FSDP or XLA; the others are here to be compared with.
    """

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"


class PrecisionType(enum.StrEnum):
    """Values of `mixed_precision`; FP8 is here to be compared with."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class RNGType(enum.StrEnum):
    """Values of `rng_types`, and what `synchronize_rng_states` can share."""

    TORCH = "torch"
    CUDA = "cuda"
    NUMPY = "numpy"
    PYTHON = "python"
    GENERATOR = "generator"
