"""What `mixed_precision` means, once for all engines: fp32 master parameters, a compute dtype, and whether the loss is scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyaccel.errors import ConfigError, nearest

MixedPrecision = Literal["no", "bf16", "fp16"]
MIXED_PRECISIONS: tuple[MixedPrecision, ...] = ("no", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class LossScaling:
    """Dynamic loss scaling (Micikevicius et al. 2018), with the defaults of torch.amp.GradScaler.

    The loss is multiplied by the scale; a step whose gradients are not finite is skipped and halves the scale; after
    `growth_interval` good steps the scale doubles.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True, slots=True)
class PrecisionPolicy:
    """Parameters and gradients stay float32; the forward pass computes in `compute_dtype` where that is safe."""

    name: MixedPrecision = "no"
    loss_scaling: LossScaling | None = None

    @property
    def compute_dtype(self) -> str:
        """The numpy name of the dtype of the forward pass: float32, bfloat16 or float16."""
        return {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.name]

    @classmethod
    def of(cls, name: str) -> PrecisionPolicy:
        """The policy of a `mixed_precision` value. Raises ConfigError for an unknown one."""
        if name not in MIXED_PRECISIONS:
            raise ConfigError(f"mixed_precision={name!r} is unknown", nearest(str(name), MIXED_PRECISIONS))
        return cls(name=name, loss_scaling=LossScaling() if name == "fp16" else None)
