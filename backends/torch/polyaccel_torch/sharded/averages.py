"""A moving average of parameters in pieces (`polyaccel.averages.ParameterAverage`): each process averages its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from polyaccel_torch.sharded.mesh import local_of, with_layout_of
from polyaccel_torch.sharded.pieces import piece_of, whole_of


class PieceAverage:
    """Averages of a module's floating-point and complex parameters. Every process must make it, and all of its calls."""

    def __init__(self, module: nn.Module) -> None:
        named = {name: p for name, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self._parameters = list(named.values())
        self._averages = [
            piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True) for piece in self._pieces()
        ]

    def update(self, weight: float) -> None:
        """Of the pieces, without an exchange."""
        with torch.no_grad():
            values = [piece.to(a.dtype) for piece, a in zip(self._pieces(), self._averages, strict=True)]
            if values:
                torch._foreach_lerp_(self._averages, values, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Values are copied, in the memory that FSDP2 gathers from."""
        kept = [piece.clone() for piece in self._pieces()]
        self._assign(self._averages)
        try:
            yield
        finally:
            self._assign(kept)

    def read(self) -> dict[str, Any]:
        """Whole, on the host of every process; gathered one after another."""
        laid_out = [with_layout_of(a, p) for a, p in zip(self._averages, self._parameters, strict=True)]
        return {name: whole_of(a).cpu().numpy().copy() for name, a in zip(self.shapes, laid_out, strict=True)}

    def write(self, arrays: Mapping[str, Any]) -> None:
        """From whole arrays, the same on every process."""
        with torch.no_grad():
            for name, average, parameter in zip(self.shapes, self._averages, self._parameters, strict=True):
                whole = torch.from_numpy(np.array(arrays[name])).to(average.dtype)
                average.copy_(local_of(piece_of(whole, parameter)))

    def _pieces(self) -> list[torch.Tensor]:
        return [local_of(parameter.detach()) for parameter in self._parameters]

    def _assign(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for piece, value in zip(self._pieces(), values, strict=True):
                piece.copy_(value)
