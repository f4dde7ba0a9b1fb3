"""Targets of the CTC loss as scripts concatenate them, `labels.masked_select(labels >= 0)` or `labels[labels >= 0]`, at a fixed shape.

The size of such a selection depends on values. The CTC loss also takes the same targets as rows, so the selection stays unmade
until it gets there; anything else that is done with it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch

from polyaccel.errors import PrepareError

_SAME = frozenset(
    {"to", "long", "int", "cpu", "contiguous", "detach", "clone", "flatten"}
)  # what leaves the labels as they are


@final
class SelectedTargets:
    """The elements of `labels` (batch, longest) where `mask` is true, not yet put one after the other."""

    def __init__(self, labels: torch.Tensor, mask: torch.Tensor) -> None:
        self._labels, self._mask = labels, mask

    def rows(self) -> torch.Tensor:
        """The labels with the selected ones at the front of every row, in their order."""
        order = torch.argsort(self._mask.logical_not().to(torch.uint8), dim=1, stable=True)
        return self._labels.gather(1, order)

    def __getattr__(self, name: str) -> Any:
        if name in _SAME:
            return lambda *args, **kwargs: self
        raise _refusal(name)

    def _refuse(self, *args: Any) -> Any:
        raise _refusal("arithmetic or indexing")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __len__ = __iter__ = __bool__ = _refuse

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise _refusal(getattr(func, "__name__", str(func)))


def _refusal(use: str) -> PrepareError:
    return PrepareError(
        f"{use} of elements that a mask selects: how many there are depends on values, so the model is no fixed program",
        "use a mask with torch.where instead of selecting elements; F.ctc_loss alone takes such a selection of (batch, longest) labels",
    )


def _is_selection(labels: Any, mask: Any) -> bool:
    return (
        isinstance(labels, torch.Tensor)
        and isinstance(mask, torch.Tensor)
        and mask.dtype is torch.bool
        and labels.dim() == 2
        and labels.shape == mask.shape
        and labels.dtype in (torch.int32, torch.int64)
    )


def _masked_select(labels: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
    return (
        SelectedTargets(labels, mask)
        if not kwargs and _is_selection(labels, mask)
        else torch.masked_select(labels, mask, **kwargs)
    )


def _getitem(tensor: torch.Tensor, index: Any) -> Any:
    return SelectedTargets(tensor, index) if _is_selection(tensor, index) else torch.Tensor.__getitem__(tensor, index)


SELECTIONS: dict[Any, Callable[..., Any]] = {
    torch.masked_select: _masked_select,
    torch.Tensor.masked_select: _masked_select,
    torch.Tensor.__getitem__: _getitem,
}
