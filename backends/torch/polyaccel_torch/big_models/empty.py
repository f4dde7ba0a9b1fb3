"""Models without memory: parameters, and buffers where asked, are born on a device of choice, "meta" above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from polyaccel_torch.big_models.tensors import like


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[None]:
    """Parameters of modules made inside are on the meta device: shapes without values."""
    return init_on_device(torch.device("meta"), include_buffers=include_buffers)


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """Parameters of modules made inside are on `device`; buffers too with `include_buffers`."""
    target = torch.device(device)
    if include_buffers:
        with target:
            yield
        return

    # Buffers hold what no checkpoint may have (masks, frequencies), so they are computed where they are; only parameters move.
    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or is_lazy(parameter) or parameter.device == target:
            return None
        return like(parameter, parameter.detach().to(target))

    hook = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # torch's annotation allows no result
    try:
        yield
    finally:
        hook.remove()
