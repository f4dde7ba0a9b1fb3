"""Two checks of transformers that read a value, and that a captured program can do without.

`if not torch.isfinite(x).all(): x = torch.clamp(x, -largest, largest)`: the branch leaves finite values alone and is taken always.
`if labels.max() >= vocab_size: raise` before a CTC loss: the loss of labels that are no classes is NaN. Any other use of such a
check is refused as the read of a value that it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_CHECKED = "_polyaccel_finite_check_of"
_CLAMPS = frozenset({"isfinite", "clamp", "finfo", "max"})
_LABELS = "_polyaccel_largest_label"
_LABEL_CHECK = frozenset({"max", "vocab_size", "ctc_loss_reduction", "ctc_zero_infinity"})


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
    return False if _is_needless(tensor) else torch.Tensor.item(tensor)


def _bool(tensor: torch.Tensor) -> bool:
    """A fake tensor, which is what shapes are found with, is asked itself."""
    return not _is_needless(tensor) and torch.Tensor.__bool__(tensor)


def _is_needless(tensor: torch.Tensor) -> bool:
    dtype = getattr(tensor, _CHECKED, None)
    if dtype is not None and _clamps_after(_caller(), dtype):
        return True
    return hasattr(tensor, _LABELS) and _names(_caller()) >= _LABEL_CHECK


def _max(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    found = torch.Tensor.max(tensor, *args, **kwargs)
    if not args and not kwargs and not tensor.is_floating_point():
        setattr(found, _LABELS, True)
    return found


def _at_least(tensor: torch.Tensor, other: Any) -> Any:
    found = torch.Tensor.ge(tensor, other)
    if hasattr(tensor, _LABELS) and isinstance(other, int):
        setattr(found, _LABELS, True)
    return found


def _caller() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in (
        "torch",
        "polyaccel_bridges",
    ):
        frame = frame.f_back
    return frame


def _names(frame: FrameType | None) -> frozenset[str]:
    """What the code of this frame mentions, if it is a model of transformers."""
    if frame is None or not str(frame.f_globals.get("__name__", "")).startswith("transformers.models."):
        return frozenset()
    return frozenset(frame.f_code.co_names)


def _clamps_after(frame: FrameType | None, dtype: torch.dtype) -> bool:
    # Their bound is the largest number less 1000: the largest number itself, but for float16.
    return dtype in (torch.float32, torch.float64, torch.bfloat16) and _names(frame) >= _CLAMPS


VALUE_CHECKS: dict[Any, Callable[..., Any]] = {
    torch.isfinite: _isfinite,
    torch.Tensor.isfinite: _isfinite,
    torch.Tensor.all: _all,
    torch.Tensor.item: _item,
    torch.Tensor.__bool__: _bool,
    torch.Tensor.max: _max,
    torch.Tensor.__ge__: _at_least,
    torch.Tensor.ge: _at_least,
}
