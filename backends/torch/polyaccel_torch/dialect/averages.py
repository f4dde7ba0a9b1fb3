"""A moving average of a module's parameters (`polyaccel.averages.ParameterAverage`), beside them on their device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Move = Callable[[list[torch.Tensor], list[torch.Tensor], float], None]


def _lerp(averages: list[torch.Tensor], values: list[torch.Tensor], weight: float) -> None:
    torch._foreach_lerp_(averages, values, weight)


class ModuleAverage:
    """Averages of a module's floating-point and complex parameters.

    `upload(host, parameter)` brings a host tensor to where a parameter's values are, and `move(averages, values, weight)` moves averages
    towards values, in place: what an engine has of its own for them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        upload: Callable[[torch.Tensor, nn.Parameter], torch.Tensor] | None = None,
        move: Move = _lerp,
    ) -> None:
        named = {name: p for name, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self._parameters = list(named.values())
        self._upload = upload
        self._move = move
        self._averages = [self._start(parameter) for parameter in self._parameters]

    def update(self, weight: float) -> None:
        """One fused kernel or few, asynchronous; parameters of 16 bits are widened for it."""
        if not self._averages:
            return
        with torch.no_grad():
            values = [p.detach().to(a.dtype) for p, a in zip(self._parameters, self._averages, strict=True)]
            self._move(self._averages, values, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Values are copied and not exchanged by pointer: whoever has a view of the parameters' memory sees them."""
        with torch.no_grad():
            kept = [parameter.detach().clone() for parameter in self._parameters]
            self._assign(self._averages)
        try:
            yield
        finally:
            with torch.no_grad():
                self._assign(kept)

    def read(self) -> dict[str, Any]:
        """On the host."""
        return {name: a.cpu().numpy().copy() for name, a in zip(self.shapes, self._averages, strict=True)}

    def write(self, arrays: Mapping[str, Any]) -> None:
        """From the host."""
        for position, name in enumerate(self.shapes):
            old = self._averages[position]
            host = torch.from_numpy(np.array(arrays[name])).to(old.dtype)
            self._averages[position] = (
                host.to(old.device) if self._upload is None else self._upload(host, self._parameters[position])
            )

    def _start(self, parameter: nn.Parameter) -> torch.Tensor:
        value, dtype = parameter.detach(), torch.promote_types(parameter.dtype, torch.float32)
        if self._upload is None:
            return value.to(dtype, copy=True)
        return self._upload(value.cpu().to(dtype), parameter)

    def _assign(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
