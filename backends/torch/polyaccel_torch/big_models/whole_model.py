"""Offloading of whole models: one is on the device while it is used, and goes back when the next one starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyaccel_torch.big_models.hooks import move
from polyaccel_torch.big_models.module_hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from polyaccel_torch.big_models.sizes import Device
from polyaccel_torch.big_models.tensors import resolve_device


class CpuOffload(ModelHook):
    """The model goes to the CPU, and to `execution_device` at its next forward, where it stays.

    `prev_module_hook`: a `UserCpuOffloadHook` of the model that goes to the CPU first. None as device: the first accelerator, else the
    CPU.
    """

    def __init__(
        self, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        if execution_device is None:
            execution_device = 0 if torch.accelerator.device_count() else "cpu"
        self.execution_device = resolve_device(execution_device, "execution_device")
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        """To the CPU."""
        return module.to("cpu")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """To the device, with the inputs."""
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        module.to(self.execution_device)
        return move(args, self.execution_device), move(kwargs, self.execution_device)


class UserCpuOffloadHook:
    """A model and its hook: what `cpu_offload_with_hook` returns beside the model."""

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """The model goes to the CPU, and comes back at its next forward."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """The model stays where it is from now on."""
        remove_hook_from_module(self.model)


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """The model, on the CPU until its next forward, and the hook that sends it back."""
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
