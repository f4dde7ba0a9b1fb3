"""Errors of torch's tracer in the user's words: where the values of tensors decide what is computed, and on which line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from polyaccel.errors import PrepareError

from .sources import source_of_error

_SHAPE_HINT = (
    "use a mask with torch.where instead of selecting elements, move it out of the model, or use the torch backend"
)
_SHAPE_HINTS: dict[Any, str] = {F.one_hot: "pass the number of classes: one_hot(labels, num_classes=10)"}


def explained(error: Exception, paths: Mapping[int, str]) -> Exception:
    """Our error where the values of tensors decide what is computed; otherwise the original one with the place in a note."""
    source = source_of_error(error, paths)
    hint = "express the branch with torch.where, move it out of the model, or use the torch backend"
    if isinstance(error, DataDependentOutputException):
        return PrepareError(
            f"Python code uses the value of a tensor ({error.func}), so the model is no fixed program: {source}", hint
        )
    if isinstance(error, DynamicOutputShapeException):
        name = error.func.__name__ if error.func in _SHAPE_HINTS else error.func
        return PrepareError(
            f"the shape of the result of {name} depends on values, so the model is no fixed program: {source}",
            _SHAPE_HINTS.get(error.func, _SHAPE_HINT),
        )
    if isinstance(error, GuardOnDataDependentSymNode | UnsupportedOperatorException):
        return PrepareError(f"PyTorch cannot capture this: {error}; {source}", hint)
    error.add_note(f"while the model was captured: {source}")
    return error
