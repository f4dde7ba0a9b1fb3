"""The user's own model inside what was put around it: data parallel wrappers and torch.compile, told by their classes' names."""

from __future__ import annotations

import types
from typing import Any

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})


def is_compiled(module: Any) -> bool:
    """Whether this is what torch.compile made of a module."""
    return "_orig_mod" in getattr(module, "_modules", {})


def without_wrappers(
    model: Any, *, keep_forward: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The model without DistributedDataParallel, DataParallel or FullyShardedDataParallel around it; others as they are.

    Args:
        keep_forward: False: its `forward` is the one from before a wrapped one, where `_original_forward` holds that.
        keep_torch_compile: a compiled model stays compiled, around the user's own; False: without that.
        recursive: also in place of its wrapped layers.
    """
    compiled = model if is_compiled(model) else None
    own = _unwrapped(model if compiled is None else compiled._orig_mod)
    if recursive:
        own = _without_wrapped_layers(own)
    if not keep_forward:
        _restore_forward(own)
    if compiled is None or not keep_torch_compile:
        return own
    compiled._orig_mod = own
    return compiled


def _unwrapped(model: Any) -> Any:
    while any(kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch.") for kind in type(model).__mro__):
        model = model.module
    return model


def _without_wrapped_layers(module: Any) -> Any:
    module = _unwrapped(module)
    for name, layer in list(module.named_children()):
        setattr(module, name, _without_wrapped_layers(layer))
    return module


def _restore_forward(model: Any) -> None:
    original = getattr(model, "__dict__", {}).pop("_original_forward", None)
    if original is None:
        return
    forward = model.forward
    while forward != original and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    function = getattr(forward, "__func__", forward)
    if function is getattr(type(model), "forward", None):
        vars(model).pop("forward", None)  # the class's own: an attribute would only hide it
    else:
        model.forward = types.MethodType(function, model)
