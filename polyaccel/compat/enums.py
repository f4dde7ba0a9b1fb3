"""Accelerate's enums, apart from the modules that offer them: both the state classes and the utilities need them."""

from __future__ import annotations

import enum

from polyaccel.distribution import DistributedType

__all__ = ["DistributedType", "PrecisionType", "RNGType"]


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
