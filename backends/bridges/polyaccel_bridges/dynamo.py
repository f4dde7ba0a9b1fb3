"""torch.compile beside recorded loops: dynamo leaves a prepared model's values, and the code that records them, alone.

A compiled function of a script runs on such values as it was written: what is recorded is compiled as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_done: list[bool] = []


def keep_out() -> None:
    """Tell dynamo, as soon as it is loaded (torch.compile loads it). Cheap: called for every model call."""
    if _done or "torch._dynamo.eval_frame" not in sys.modules:
        return
    from . import dispatch, modules, tensors

    _done.append(True)
    config: Any = sys.modules["torch._dynamo.config"]
    config.nontraceable_tensor_subclasses |= {tensors.DeviceTensor, tensors.DeviceParameter}
    disable: Callable[[Any], Any] = torch.compiler.disable
    dispatch.dispatch = disable(dispatch.dispatch)
    modules.PreparedModule.forward = disable(modules.PreparedModule.forward)  # type: ignore[method-assign]
