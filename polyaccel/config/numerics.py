"""How narrow numbers are used: Accelerate's AutocastKwargs and GradScalerKwargs, on every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyaccel.config.handler import KwargsHandler


@dataclass
class AutocastKwargs(KwargsHandler):
    """Where the mixed precision is in force: for all prepared models, or for one `with accelerator.autocast(handler):`.

    Args:
        enabled: False: prepared models, or the operations of the block, compute in the dtype of their values.
        cache_enabled: torch casts a weight once per forward pass; None: yes.
    """

    enabled: bool = True
    cache_enabled: bool | None = None

    def settings(self) -> dict[str, Any]:
        """The settings autocast and autocast_cache."""
        renamed = {"enabled": "autocast", "cache_enabled": "autocast_cache"}
        return {renamed[name]: value for name, value in self.given().items()}


@dataclass
class GradScalerKwargs(KwargsHandler):
    """How fp16 scales its loss, as torch.amp.GradScaler does: every field is the setting `loss_scaling_...`, `enabled` is loss_scaling.

    Args:
        init_scale: the scale of the first step.
        growth_factor: what the scale is multiplied by after `growth_interval` good steps in a row.
        backoff_factor: what it is multiplied by after a step that was skipped, because a gradient was not finite.
        growth_interval: that number of steps.
        enabled: False: the loss is not scaled, and no step is skipped.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True

    def settings(self) -> dict[str, Any]:
        """The settings loss_scaling and loss_scaling_..."""
        return {"loss_scaling" if n == "enabled" else f"loss_scaling_{n}": value for n, value in self.given().items()}
