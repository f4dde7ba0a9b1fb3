"""Python numbers that change from step to step (annealed weights, schedules) as inputs of a program, where that means the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .shadows import OutSpec

_T = torch.Tensor
_LOW = (torch.bfloat16, torch.float16)
_WIDE = (torch.float64, torch.complex128)
_ADDITIONS = (_T.add, _T.sub, torch.add, torch.sub)
_WRITING = frozenset({_T.__iadd__, _T.__isub__, _T.__imul__, _T.__itruediv__, _T.add_, _T.sub_, _T.mul_, _T.div_})
_WIDENED = frozenset(
    {
        _T.__add__, _T.__radd__, _T.__sub__, _T.__rsub__, _T.__mul__, _T.__rmul__, _T.__truediv__, _T.__rtruediv__,
        _T.add, _T.sub, _T.mul, _T.div, torch.add, torch.sub, torch.mul, torch.div,
    }
)  # fmt: skip
# Operations that mean the same with a number and with a 0-dim tensor of it, their gradients included.
_ALIKE = (
    _WRITING
    | _WIDENED
    | {
        _T.where, torch.where, _T.masked_fill, torch.masked_fill, _T.lerp, torch.lerp, _T.clamp, torch.clamp, _T.clip, torch.clip,
        _T.pow, torch.pow, _T.__pow__, _T.lt, _T.le, _T.gt, _T.ge, torch.lt, torch.le, torch.gt, torch.ge,
        _T.__lt__, _T.__le__, _T.__gt__, _T.__ge__,
    }
)  # fmt: skip
Numbers = tuple[float | int, ...]


def may_change(func: Any) -> bool:
    """Whether numbers among the operands of `func` may become inputs."""
    return func in _ALIKE


def may_differ(func: Any) -> bool:
    """Whether numbers of `func` are inputs from the first, in jobs of several processes: exponents and writes are faster and simpler as
    constants, until they change."""
    return func in _ALIKE and func not in _WRITING and func not in (_T.pow, torch.pow, _T.__pow__)


def number_key(numbers: Numbers) -> tuple[Any, ...]:
    """Equal for the very same numbers alone: -0.0 is not 0.0, 1 is not 1.0, nan is nan."""
    return tuple([repr(value) if not value or value != value else (type(value), value) for value in numbers])


@dataclass(frozen=True, slots=True)
class Changing:
    """How the numbers of one operation enter its program: `func` takes 0-dim tensors of `dtype` in their places."""

    func: Callable[..., Any]
    dtype: torch.dtype

    def array(self, value: float) -> Any:
        """A number as an input."""
        return _ARRAYS[self.dtype](value)

    @property
    def example(self) -> torch.Tensor:
        """A tensor in place of a number, inside the fake mode."""
        return torch.empty((), dtype=self.dtype)


_ARRAYS: Mapping[torch.dtype, Callable[[float], Any]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
}


def changing(func: Any, numbers: Numbers, operands: Sequence[OutSpec], results: Sequence[OutSpec]) -> Changing | None:
    """How changing numbers enter `func`, by the specs of its tensor operands and of its results with constant numbers.

    None where a tensor in the place of a number would round or promote otherwise. The caller checks that the results stay alike.
    """
    if not may_change(func) or not numbers:
        return None
    dtypes = {spec.dtype for spec in (*operands, *results)}
    wrapped = Scaled(func) if func in _ADDITIONS else func
    if not dtypes.isdisjoint(_LOW):
        is_plain = func in _WIDENED and dtypes <= {*_LOW, *(spec.dtype for spec in results)} and len(results) == 1
        return Changing(Widened(wrapped, results[0].dtype), torch.float32) if is_plain else None
    if any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
        return Changing(wrapped, torch.float64 if not dtypes.isdisjoint(_WIDE) else torch.float32)
    return Changing(wrapped, torch.int64) if all(type(value) is int for value in numbers) else None


@dataclass(frozen=True, slots=True)
class Scaled:
    """torch.add and torch.sub, whose alpha is no tensor."""

    func: Callable[..., Any]

    def __call__(self, tensor: Any, other: Any, *, alpha: Any = 1, **options: Any) -> Any:
        return self.func(tensor, other if isinstance(alpha, int) else other * alpha, **options)


@dataclass(frozen=True, slots=True)
class Widened:
    """An operation on a half precision tensor and a number: torch computes it in float32 and rounds the result alone."""

    func: Callable[..., Any]
    dtype: torch.dtype

    def __call__(self, *args: Any, **options: Any) -> Any:
        wide = [arg.float() if isinstance(arg, torch.Tensor) and arg.dtype in _LOW else arg for arg in args]
        return self.func(*wide, **options).to(self.dtype)
