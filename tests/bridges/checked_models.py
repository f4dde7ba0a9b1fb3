"""Layers that check values before they compute; pytest rewrites the assertions of test files, so they are here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def asserting(x: torch.Tensor) -> None:
    assert (x > 0).all(), f"x must be positive, not {x.min()}"


def asserting_items(x: torch.Tensor) -> None:
    assert not x.isnan().any().item()
    assert x.min() > 0 and x.isinf().sum() == 0  # noqa: PT018 - two reads in one assertion


def raising(x: torch.Tensor) -> None:
    if x.min() <= 0:
        raise ValueError("x must be positive")
    if not x.isfinite().all().item() or x.sum() > 1e6:
        raise ValueError("x is too large")


def raising_in_a_with(x: torch.Tensor) -> None:
    with torch.no_grad():
        if (x <= 0).any():
            raise ValueError("x must be positive")


CHECKS = (asserting, asserting_items, raising, raising_in_a_with)


def caught(x: torch.Tensor) -> torch.Tensor:
    try:
        assert (x > 0).all()
    except AssertionError:
        return x.abs()
    return x


def either(x: torch.Tensor) -> None:
    assert (x > 0).all() or (x < 0).all()


def branching(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def kept(x: torch.Tensor) -> None:
    is_positive = (x > 0).all().item()
    assert is_positive


REFUSED = (caught, either, branching, kept)


class Checked(nn.Module):
    """A linear layer whose `check` looks at its input and may replace it."""

    def __init__(self, check: Callable[[torch.Tensor], torch.Tensor | None], *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.layer, self.check, self.is_checkpointed = nn.Linear(3, 2), check, is_checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_checkpointed:
            found: torch.Tensor = checkpoint(self._forward, x, use_reentrant=False)
            return found
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        replaced = self.check(x)
        return self.layer(x if replaced is None else replaced)
