"""`accelerate.utils.dataclasses`: its enums, settings objects and their base."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyaccel.compat.enums import DistributedType, PrecisionType, RNGType
from polyaccel.config.accumulating import GradientAccumulationPlugin
from polyaccel.config.handler import KwargsHandler
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.project import ProjectConfiguration
from polyaccel.tracking.names import LoggerType

__all__ = [
    "DataLoaderConfiguration",
    "DistributedType",
    "GradientAccumulationPlugin",
    "KwargsHandler",
    "LoggerType",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
]


@dataclasses.dataclass
class TensorInformation:
    """Shape and dtype of an array that is elsewhere."""

    shape: Any
    dtype: Any
