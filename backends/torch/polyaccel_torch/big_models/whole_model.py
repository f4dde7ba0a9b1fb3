"""Offloading of whole models: one is on the device while it is used, and goes back when the next one starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyaccel_torch.big_models.hooks import move
from polyaccel_torch.big_models.sizes import Device
from polyaccel_torch.big_models.tensors import resolve_device


class OffloadHook:
    """What `cpu_offload_with_hook` returns beside the model."""

    def __init__(self, model: nn.Module, device: torch.device, previous: OffloadHook | None) -> None:
        self.model = model
        self._device = device
        self._previous = previous
        self._handle = model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        self.offload()

    def offload(self) -> None:
        """The model goes to the CPU, and comes back at its next forward."""
        self.model.to("cpu")

    def remove(self) -> None:
        """The model stays where it is from now on."""
        self._handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._previous is not None:
            self._previous.offload()
        module.to(self._device)
        return move(args, self._device), move(kwargs, self._device)


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Device | None = None, prev_module_hook: OffloadHook | None = None
) -> tuple[nn.Module, OffloadHook]:
    """The model, on the CPU until its next forward, and the hook that sends it back."""
    if execution_device is None:
        execution_device = 0 if torch.accelerator.device_count() else "cpu"
    device = resolve_device(execution_device, "execution_device")
    return model, OffloadHook(model, device, prev_module_hook)
