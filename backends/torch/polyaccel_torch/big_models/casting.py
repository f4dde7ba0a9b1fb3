"""Layers whose weights are kept in a narrow dtype and are widened for each forward."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from polyaccel_torch.big_models.module_hooks import ModelHook, add_hook_to_module
from polyaccel_torch.big_models.tensors import join

# Others compute with weights of their own, whose loss of precision nobody has looked at.
CASTABLE_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


class LayerwiseCastingHook(ModelHook):
    """Weights in `storage_dtype`; in `compute_dtype` while the module runs. What is lost in storage stays lost."""

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool = False) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Into storage."""
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Wide enough to compute."""
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Into storage."""
        module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)
        return output

    def forward_failed(self, module: nn.Module) -> None:
        """Into storage."""
        module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Iterable[str] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Keep linear and convolution layers inside `module` in `storage_dtype` (such as torch.float8_e4m3fn), and compute in another.

    Modules whose name one of the patterns (regular expressions, searched for) matches, or whose class is listed, stay as they are,
    with all inside them. For inference: a float8 weight has no gradient.
    """
    patterns = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else list(skip_modules_pattern or ())
    hook = LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking)
    _attach(module, "", hook, patterns, tuple(skip_modules_classes or ()))


def _attach(
    module: nn.Module, name: str, hook: ModelHook, patterns: list[str], classes: tuple[type[nn.Module], ...]
) -> None:
    if isinstance(module, classes) or any(re.search(pattern, name) for pattern in patterns):
        return
    if isinstance(module, CASTABLE_LAYERS):
        add_hook_to_module(module, hook, append=True)
        return
    for child, part in module.named_children():
        _attach(part, join(name, child), hook, patterns, classes)
