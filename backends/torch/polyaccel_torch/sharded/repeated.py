"""Parameters that a rule keeps whole on every process, beside those that FSDP2 cuts: backward averages their gradients here."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyaccel_torch.sharded.mesh import local_of


class RepeatedGradients:
    """Averages the gradients of some parameters over process groups, at the end of each backward while `is_averaging`.

    What earlier micro batches have left is averaged with it: added up before, it gives the same sum, and averaged already, it stays.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
        self.is_averaging = True
        self._groups = groups
        self._parameters = tuple(parameters)
        self._is_averaged = True
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._average)

    @property
    def has_own(self) -> bool:
        """Whether a backward, or a checkpoint, has left gradients that differ between processes."""
        return not self._is_averaged and any(parameter.grad is not None for parameter in self._parameters)

    @has_own.setter
    def has_own(self, has_own: bool) -> None:
        self._is_averaged = not has_own

    @torch.no_grad()
    def _average(self, parameter: torch.Tensor) -> None:
        self._is_averaged = self.is_averaging
        grad = parameter.grad
        if not self.is_averaging or grad is None:
            return
        piece = local_of(grad)  # on the tensor axis it may still be in summands, whose averages add up all the same
        for group in self._groups:
            dist.all_reduce(piece, group=group)
            piece /= dist.get_world_size(group)


of_model: weakref.WeakKeyDictionary[nn.Module, RepeatedGradients] = weakref.WeakKeyDictionary()
