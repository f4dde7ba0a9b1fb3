"""Hooks around a module's `forward`, in Accelerate's form: objects with two methods, one at a time on a module.

They stand in `module.forward` itself, so that calling it directly runs them too; the module's own is in `module._old_forward`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


class ModelHook:
    """What runs around a forward. A subclass replaces the methods it needs.

    no_grad: the forward runs without recording gradients.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """When it is added. Returns the module."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Before the forward. Returns the positional and keyword arguments that it gets."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """After the forward. Returns what the caller gets."""
        return output

    def forward_failed(self, module: nn.Module) -> None:
        """After a forward that raised, and whose `pre_forward` did not."""

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """When it is removed. Returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several, one after another, before and after the forward alike."""

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Each in turn."""
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Each gets what the one before it returned."""
        for at, hook in enumerate(self.hooks):
            try:
                args, kwargs = hook.pre_forward(module, *args, **kwargs)
            except BaseException:
                for entered in self.hooks[:at]:
                    entered.forward_failed(module)
                raise
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Each gets what the one before it returned."""
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def forward_failed(self, module: nn.Module) -> None:
        """Each in turn."""
        for hook in self.hooks:
            hook.forward_failed(module)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Each in turn."""
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Put a hook on a module, in the place of the one it has, or after it with `append`. Returns the module."""
    present = getattr(module, "_hf_hook", None)
    remove_hook_from_module(
        module
    )  # what it did to the module is undone, so that the new one finds the module's own weights
    if append and present is not None:
        hook = SequentialHook(present, hook)
    module = hook.init_hook(module)
    old = module.forward
    module._hf_hook = hook  # type: ignore[assignment]
    module._old_forward = old  # type: ignore[assignment]
    # A partial of the module, and no closure over it: a deep copy of the module then calls the copy.
    module.forward = functools.update_wrapper(functools.partial(_forward, module), old)
    return module


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hook: Any = module._hf_hook
    forward: Any = module._old_forward
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        if hook.no_grad:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        else:
            output = forward(*args, **kwargs)
    except BaseException:
        hook.forward_failed(module)
        raise
    return hook.post_forward(module, output)


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Take a module's hook off, and with `recurse` those of all modules inside it. Returns the module."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.detach_hook(module)
        old: Any = module._old_forward
        if getattr(old, "__func__", None) is type(module).forward:
            del module.__dict__[
                "forward"
            ]  # the class's again: also one that its class gets later, as that of a traced graph
        else:
            module.forward = old
        for name in ("_hf_hook", "_old_forward"):
            del module.__dict__[name]
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def hooks_on(module: nn.Module) -> list[ModelHook]:
    """The hooks on this module itself, those of a sequence one by one."""
    found: list[ModelHook] = []
    waiting: list[Any] = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop(0)
        if isinstance(hook, SequentialHook):
            waiting = [*hook.hooks, *waiting]
        elif isinstance(hook, ModelHook):
            found.append(hook)
    return found
