"""nn.Modules without an engine: autocast around a module's call, float32 outputs, and parameters by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from polyaccel import trees
from polyaccel.errors import CheckpointError, PrepareError

Autocast = Callable[..., AbstractContextManager[Any]]
_HALF = (torch.float16, torch.bfloat16)


def cast_to_float32(outputs: Any) -> Any:
    """The same nested outputs with every float16 and bfloat16 tensor cast to float32 (gradients flow through the cast)."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype in _HALF else outputs
    return trees.map_leaves(_cast_leaf, outputs)


def _cast_leaf(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype in _HALF else leaf


class _EnterAutocast:
    """Forward pre-hook. One context per running call: a module may call itself."""

    def __init__(self, autocast: Autocast) -> None:
        self.autocast = autocast
        self.running: list[AbstractContextManager[Any]] = []

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        context = self.autocast()
        context.__enter__()
        self.running.append(context)


class _LeaveAutocast:
    """Forward hook, called after an exception too."""

    def __init__(self, entered: _EnterAutocast) -> None:
        self._entered = entered

    def __call__(self, module: nn.Module, arguments: Any, outputs: Any) -> Any:
        self._entered.running.pop().__exit__(None, None, None)
        return cast_to_float32(outputs)


def add_autocast(module: nn.Module, autocast: Autocast) -> None:
    """From now on `module(...)` runs inside `autocast()` and returns float32 where it computed in half precision.

    Hooks do it: `module.forward` stays the user's own. A module that has them already gets new ones instead.
    """
    remove_autocast(module)
    entered = _EnterAutocast(autocast)
    module.register_forward_pre_hook(entered)
    module.register_forward_hook(_LeaveAutocast(entered), always_call=True)


def remove_autocast(module: nn.Module) -> None:
    """Undo `add_autocast`; nothing on a module without it."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, (_EnterAutocast, _LeaveAutocast)):
                del hooks[key]


def mark_prepared(module: nn.Module) -> None:
    """Accelerate's mark of what has been through prepare, which scripts of its users ask for."""
    module._is_accelerate_prepared = True  # type: ignore[assignment]


def check_placeable(module: nn.Module, *, scales_loss: bool, takes_meta: bool = False) -> None:
    """Raises PrepareError for parameters that cannot be trained as they are: float16 under loss scaling, or without values where
    nobody computes them (`takes_meta`)."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta and not takes_meta:
            raise PrepareError(
                f"{type(module).__name__}.{name} is on the meta device: it has a shape and no values",
                "create the model without torch.device('meta'), or load its values before prepare",
            )
        if scales_loss and parameter.dtype == torch.float16 and parameter.requires_grad:
            raise PrepareError(
                f"{type(module).__name__}.{name} is float16, and mixed_precision='fp16' needs float32 parameters to update",
                "load the model in float32 (model.float()): prepare lets it compute in float16",
            )


def is_on(module: nn.Module, device: torch.device) -> bool:
    """True if every parameter and buffer is on `device`."""
    return all(tensor.device == device for tensor in itertools.chain(module.parameters(), module.buffers()))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by the names of `module.state_dict()`; a tied parameter once, by its first name.

    Raises CheckpointError for state that is no tensor.
    """
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{type(module).__name__}.{name} is a {type(tensor).__name__}, and only tensors can be saved by shards",
                "keep it in a buffer (register_buffer), or save the module's own state_dict",
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
