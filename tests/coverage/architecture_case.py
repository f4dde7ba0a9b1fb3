"""What one architecture of the coverage table is: a tiny model with random weights, its batches and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


def own_loss(outputs: Any, batch: Batch) -> torch.Tensor:
    """The loss that the model computes itself from labels in the batch."""
    return outputs.loss


@dataclass(frozen=True)
class Case:
    """One row of docs/architectures.md.

    `build()` gives a model without dropout, after `torch.manual_seed`. `batch(step)` gives the keyword arguments of its forward in that
    step; torch's generator is seeded by the step before. `loss(outputs, batch)` is a scalar. `note` stands in the table: a setting that
    the model needs, and why. `needs`: distributions without which it is not run. `steps`: fewer than 20 only with a note that says why.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Batch], torch.Tensor] = own_loss
    note: str = ""
    needs: tuple[str, ...] = ("transformers",)
    steps: int = 20


_MASKING = ("mask_time_prob", "mask_feature_prob")  # what audio models drop of their input


def without_dropout(config: Any) -> Any:
    """The same config with every probability of dropping something at 0, in nested configs too."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            without_dropout(value)
        elif ("drop" in name or name in _MASKING) and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))
    return config


def token_ids(batch: int = 2, length: int = 16, vocab: int = 100, low: int = 5) -> torch.Tensor:
    """Random token ids (batch, length); the first `low` ids are left to special tokens."""
    return torch.randint(low, vocab, (batch, length))
