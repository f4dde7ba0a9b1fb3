"""`accelerate.utils.dataclasses`: its enums, settings objects and their base."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from polyaccel.compat.enums import DistributedType, PrecisionType, RNGType
from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.project import ProjectConfiguration
from polyaccel.tracking.names import LoggerType

__all__ = [
    "DistributedType",
    "KwargsHandler",
    "LoggerType",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
]


class KwargsHandler:
    """Base of dataclasses whose fields all have defaults."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, copied."""
        return copy.deepcopy(vars(self))

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if defaults[name] != value}


@dataclasses.dataclass
class TensorInformation:
    """Shape and dtype of an array that is elsewhere."""

    shape: Any
    dtype: Any
