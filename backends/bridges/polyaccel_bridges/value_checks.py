"""Reads of a truth value that a captured program can do without; any other is refused as the read of a value that it is.

A branch that only raises is not taken (raising_branches.py), nor is torch's own check of a tensor. In transformers,
`if not torch.isfinite(x).all(): x = torch.clamp(x, -largest, largest)` leaves finite values alone and is taken always.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from .raising_branches import Raise, raise_of

_CHECKED = "_polyaccel_finite_check_of"
_CHECK = torch._check_tensor_all_with.__code__  # it goes on, or raises
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


def _item(raises: list[Raise], tensor: torch.Tensor) -> Any:
    """The truth value of a functional tensor, which is what a capture works on, is its `item()`."""
    known = _known_truth(raises, tensor)
    return torch.Tensor.item(tensor) if known is None else known


def _bool(raises: list[Raise], tensor: torch.Tensor) -> bool:
    """A fake tensor, which is what shapes are found with, is asked itself."""
    known = _known_truth(raises, tensor)
    return torch.Tensor.__bool__(tensor) if known is None else known


def _known_truth(raises: list[Raise], tensor: torch.Tensor) -> bool | None:
    frame = _caller()
    dtype = getattr(tensor, _CHECKED, None)
    if dtype is not None and _clamps_after(frame, dtype):
        return False
    found = _torchs_check(tensor, frame) or raise_of(tensor, frame)
    if found is None:
        return None
    raises.append(found)
    return not found.when


def _torchs_check(tensor: torch.Tensor, caller: FrameType | None) -> Raise | None:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame is not caller:
        if frame.f_code is _CHECK:
            place = "" if caller is None else f"{caller.f_code.co_filename}:{caller.f_lineno}"
            return Raise(tensor, False, place)
        frame = frame.f_back
    return None


def _caller() -> FrameType | None:
    frame: FrameType | None = sys._getframe(3)
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
    return dtype in (torch.float32, torch.float64, torch.bfloat16) and frozenset(frame.f_code.co_names) >= _CLAMPS


VALUE_CHECKS: dict[Any, Callable[..., Any]] = {
    torch.isfinite: _isfinite,
    torch.Tensor.isfinite: _isfinite,
    torch.Tensor.all: _all,
}
# These also take the list of the raises that were left out so far.
READS: dict[Any, Callable[..., Any]] = {torch.Tensor.item: _item, torch.Tensor.__bool__: _bool}
