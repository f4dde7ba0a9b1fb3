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

    def __post_init__(self) -> None:
        for name, is_possible, rule in (
            ("init_scale", self.init_scale > 0, "above 0"),
            ("growth_factor", self.growth_factor > 1, "above 1"),
            ("backoff_factor", 0 < self.backoff_factor < 1, "between 0 and 1"),
        ):
            if not is_possible:
                raise ConfigError(f"loss_scaling_{name}={getattr(self, name)!r} cannot be", f"use a number {rule}")


_USUAL = LossScaling()


@dataclass(frozen=True, slots=True)
class PrecisionPolicy:
    """Parameters and gradients stay float32; prepared models compute in `compute_dtype` where that is safe.

    `autocast` False: prepared models compute in float32 too, and only what asks for it is narrow.
    """

    name: MixedPrecision = "no"
    loss_scaling: LossScaling | None = None
    autocast: bool = True

    @property
    def compute_dtype(self) -> str:
        """The numpy name of the dtype of the forward pass: float32, bfloat16 or float16."""
        return self.narrow_dtype if self.autocast else "float32"

    @property
    def narrow_dtype(self) -> str:
        """The numpy name of the dtype that `mixed_precision` stands for."""
        return {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.name]

    @classmethod
    def of(cls, name: str, scaling: LossScaling | None = _USUAL, *, autocast: bool = True) -> PrecisionPolicy:
        """The policy of a `mixed_precision` value; `scaling` is that of fp16. Raises ConfigError for an unknown one."""
        if name not in MIXED_PRECISIONS:
            raise ConfigError(f"mixed_precision={name!r} is unknown", nearest(str(name), MIXED_PRECISIONS))
        return cls(name=name, loss_scaling=scaling if name == "fp16" else None, autocast=autocast)
