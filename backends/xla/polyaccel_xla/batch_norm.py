"""BatchNorm's running variance as torch defines it: the unbiased one.

torch_xla 2.9 normalizes as torch does, but moves `running_var` towards the variance divided by n where torch takes n - 1, which
shows in evaluation when a global batch holds few values per channel. This file goes when torch_xla's own result equals torch's
(tests/adapter_xla compares them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm


class _RunningVariance:
    """Hooks around one layer's forward pass; traced, without waiting for the devices."""

    def __init__(self) -> None:
        self.before: torch.Tensor | None = None

    def remember(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        """Keep the running variance that a training pass starts from."""
        is_moving = layer.training and layer.track_running_stats and layer.running_var is not None
        self.before = layer.running_var.clone() if is_moving else None

    def correct(self, layer: Any, arguments: tuple[Any, ...], outputs: Any) -> None:
        """after = (1 - momentum) before + momentum v: add momentum v / (n - 1), so that v becomes v n / (n - 1)."""
        before, self.before = self.before, None
        count = outputs.numel() // outputs.shape[1]
        if before is None or count < 2:
            return
        momentum = layer.momentum if layer.momentum is not None else 1.0 / layer.num_batches_tracked
        with torch.no_grad():
            moved = layer.running_var - (1.0 - momentum) * before
            # .data: autograd has saved running_var and refuses a later change, though training passes never read it back.
            layer.running_var.data.add_(moved / (count - 1))


def correct_running_variance(module: torch.nn.Module) -> None:
    """Install the correction on every BatchNorm layer of a module, once."""
    for layer in module.modules():
        if not isinstance(layer, _BatchNorm):
            continue
        owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
        if not any(isinstance(owner, _RunningVariance) for owner in owners):
            variance = _RunningVariance()
            layer.register_forward_pre_hook(variance.remember)
            layer.register_forward_hook(variance.correct)
