"""`if not torch.isfinite(x).all(): x = torch.clamp(x, -largest, largest)` without reading a value, as layers of transformers have it.

The branch leaves finite values alone, so a captured program takes it always. Any other use of such a check is refused as the read
of a value that it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_CHECKED = "_polyaccel_finite_check_of"
_CLAMPS = frozenset({"isfinite", "clamp", "finfo", "max"})


def _isfinite(tensor: torch.Tensor) -> torch.Tensor:
    found = torch.isfinite(tensor)
    setattr(found, _CHECKED, tensor.dtype)
    return found


def _all(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    found = torch.Tensor.all(tensor, *args, **kwargs)
    if not args and not kwargs and hasattr(tensor, _CHECKED):
        setattr(found, _CHECKED, getattr(tensor, _CHECKED))
    return found


def _item(tensor: torch.Tensor) -> Any:
    """The truth value of a functional tensor, which is what a capture works on, is its `item()`."""
    dtype = getattr(tensor, _CHECKED, None)
    if dtype is not None and _clamps_after(_caller(), dtype):
        return False
    return torch.Tensor.item(tensor)


def _caller() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in (
        "torch",
        "polyaccel_bridges",
    ):
        frame = frame.f_back
    return frame


def _clamps_after(frame: FrameType | None, dtype: torch.dtype) -> bool:
    if frame is None or not str(frame.f_globals.get("__name__", "")).startswith("transformers.models."):
        return False
    # Their bound is the largest number less 1000: the largest number itself, but for float16.
    return dtype in (torch.float32, torch.float64, torch.bfloat16) and set(frame.f_code.co_names) >= _CLAMPS


FINITE_CHECKS: dict[Any, Callable[..., Any]] = {
    torch.isfinite: _isfinite,
    torch.Tensor.isfinite: _isfinite,
    torch.Tensor.all: _all,
    torch.Tensor.item: _item,
}
