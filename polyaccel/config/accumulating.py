"""When gradients are exchanged and applied: Accelerate's GradientAccumulationPlugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyaccel.config.handler import KwargsHandler


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """Settings of gradient accumulation.

    Args:
        num_steps: batches per optimizer update: the setting `gradient_accumulation_steps`.
        adjust_scheduler: a scheduler counts the batches on which it is not stepped, as torch's own check of the order expects.
        sync_with_dataloader: the last batch of a loader closes its window, however full.
        sync_each_batch: exchange gradients after every batch: more communication, less memory.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def settings(self) -> dict[str, Any]:
        """`num_steps` is the setting gradient_accumulation_steps."""
        given = self.given()
        if "num_steps" in given:
            given["gradient_accumulation_steps"] = given.pop("num_steps")
        return given
