"""`accelerate.utils.dataclasses`: its enums, settings objects and their base. The objects are those of `polyaccel.config`; where Accelerate
fills their fields from variables of its own, so do these."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyaccel.compat.enums import DistributedType, PrecisionType, RNGType
from polyaccel.compat.utils.environment import parse_choice_from_env, parse_flag_from_env
from polyaccel.config import compiling
from polyaccel.config.absent import (
    AORecipeKwargs,
    DeepSpeedPlugin,
    DeepSpeedSequenceParallelConfig,
    DummyOptim,
    DummyScheduler,
    FP8RecipeKwargs,
    MegatronLMDummyScheduler,
    MegatronLMPlugin,
    MSAMPRecipeKwargs,
    TERecipeKwargs,
)
from polyaccel.config.accumulating import GradientAccumulationPlugin
from polyaccel.config.compiling import DynamoBackend
from polyaccel.config.exchange import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from polyaccel.config.handler import KwargsHandler
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.config.numerics import AutocastKwargs, GradScalerKwargs
from polyaccel.config.parallel import FullyShardedDataParallelPlugin, TorchTensorParallelPlugin
from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.project import ProjectConfiguration
from polyaccel.errors import ConfigError
from polyaccel.tracking.names import LoggerType

__all__ = [
    "AORecipeKwargs",
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DeepSpeedSequenceParallelConfig",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DummyOptim",
    "DummyScheduler",
    "DynamoBackend",
    "FP8RecipeKwargs",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "MSAMPRecipeKwargs",
    "MegatronLMDummyScheduler",
    "MegatronLMPlugin",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TERecipeKwargs",
    "TensorInformation",
    "TorchContextParallelConfig",
    "TorchDynamoPlugin",
    "TorchTensorParallelConfig",
    "TorchTensorParallelPlugin",
]

_STRATEGIES = ("allgather", "alltoall")


@dataclasses.dataclass
class TensorInformation:
    """Shape and dtype of an array that is elsewhere."""

    shape: Any
    dtype: Any


@dataclasses.dataclass
class TorchDynamoPlugin(compiling.TorchDynamoPlugin):
    """The settings object of `polyaccel.config`; fields that are not given come from ACCELERATE_DYNAMO_* at once."""

    def __post_init__(self) -> None:
        prefix = "ACCELERATE_DYNAMO_"
        if self.backend is None:
            self.backend = parse_choice_from_env(prefix + "BACKEND", "no")
        if self.mode is None:
            self.mode = parse_choice_from_env(prefix + "MODE", "default")
        if self.fullgraph is None:
            self.fullgraph = parse_flag_from_env(prefix + "USE_FULLGRAPH")
        if self.use_regional_compilation is None:
            self.use_regional_compilation = parse_flag_from_env(prefix + "USE_REGIONAL_COMPILATION")
        if self.dynamic is None and parse_choice_from_env(prefix + "USE_DYNAMIC", ""):
            self.dynamic = parse_flag_from_env(prefix + "USE_DYNAMIC")
        super().__post_init__()

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        without_variables = {"backend": DynamoBackend.NO, "mode": "default", "fullgraph": False}
        return {**super()._defaults(), **without_variables, "use_regional_compilation": False}


@dataclasses.dataclass
class TorchContextParallelConfig:
    """How Accelerate's context parallelism talks. Here the engine decides it; `mesh.sequence` says over how many devices.

    Raises ConfigError for a strategy that Accelerate does not have.
    """

    cp_comm_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.cp_comm_strategy is None:
            self.cp_comm_strategy = parse_choice_from_env("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "allgather")
        if self.cp_comm_strategy not in _STRATEGIES:
            raise ConfigError(
                f"Invalid cp_comm_strategy: {self.cp_comm_strategy}", f"Accelerate knows {' and '.join(_STRATEGIES)}"
            )


@dataclasses.dataclass
class TorchTensorParallelConfig:
    """How Accelerate's tensor parallelism is done. Here the engine decides it; `mesh.tensor` says over how many devices."""

    enable_async_tp: bool = False
