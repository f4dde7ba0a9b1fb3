"""Packed sequences as programs of fixed size: the padded batch stays padded, and the lengths decide what counts.

PyTorch packs the real steps of all sequences into one tensor whose size is the sum of the lengths, which no compiled program can
have. Recurrent layers, and `pad_packed_sequence`, are all that looks into one; they give the same numbers here. What PyTorch would raise
for (a length of 0, unsorted lengths under `enforce_sorted`) gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, final

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from polyaccel.errors import PrepareError, UnsupportedError

from .recurrent import run_layers

_KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "tanh", "RNN_RELU": "relu"}
_OWN_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


class _Longest(int):
    """The padded length, where user code names no `total_length`."""


@final
class PackedRows:
    """In the place of `PackedSequence.data`: the padded batch (time, batch, features) and the lengths (batch,)."""

    def __init__(self, padded: torch.Tensor, lengths: torch.Tensor) -> None:
        object.__setattr__(self, "_held", (padded, lengths))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise self._refusal()

    @staticmethod
    def _refusal() -> PrepareError:
        return PrepareError(
            "the data of a PackedSequence is used: its size depends on the lengths of the sequences, so it is no fixed program",
            "work on the padded batch before pack_padded_sequence, or after pad_packed_sequence, with a mask",
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise cls._refusal()

    def __len__(self) -> int:
        raise self._refusal()

    def __getitem__(self, item: Any) -> Any:
        raise self._refusal()


@final
class PackedSizes:
    """In the place of `PackedSequence.batch_sizes`."""

    device = torch.device("cpu")

    def __init__(self, time: int) -> None:
        self._time = time

    def size(self, dim: int) -> int:
        """The number of steps: of the padded batch, which the longest sequence must fill."""
        return _Longest(self._time)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise PackedRows._refusal()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise PackedRows._refusal()


def held(rows: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded batch, lengths)."""
    found: tuple[torch.Tensor, torch.Tensor] = object.__getattribute__(rows, "_held")
    return found


def _mask(padded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(padded.shape[0], device=lengths.device)
    return (steps[:, None] < lengths).reshape(*padded.shape[:2], *[1] * (padded.dim() - 2))


def pack(padded: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[PackedRows, PackedSizes]:
    """`torch._VF._pack_padded_sequence`."""
    if lengths.dim() != 1 or lengths.shape[0] != padded.shape[0 if batch_first else 1]:
        raise RuntimeError(
            f"Expected `len(lengths)` to be equal to batch_size, but got {tuple(lengths.shape)} (batch_size={padded.shape})"
        )
    padded = padded.transpose(0, 1) if batch_first else padded
    time = padded.shape[0]
    is_valid = (lengths.min() >= 1) & (lengths.max() <= time) & (lengths[1:] <= lengths[:-1]).all()
    lengths = lengths.clamp(1, time)
    padded = torch.where(_mask(padded, lengths), padded, torch.zeros((), dtype=padded.dtype))
    return PackedRows(_or_nan(is_valid, padded), lengths), PackedSizes(time)


def unpack(
    rows: PackedRows, sizes: PackedSizes, batch_first: bool, padding_value: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch._VF._pad_packed_sequence`."""
    padded, lengths = held(rows)
    time = padded.shape[0]
    padded = torch.where(_mask(padded, lengths), padded, torch.full((), padding_value, dtype=padded.dtype))
    if isinstance(total_length, _Longest):  # torch's result has as many steps as the longest sequence
        padded = _or_nan(lengths.max() == time, padded)
    elif total_length > time:
        padded = F.pad(padded, [0, 0] * (padded.dim() - 1) + [0, total_length - time], value=padding_value)
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def _or_nan(is_valid: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        raise UnsupportedError(
            f"a packed sequence of {value.dtype}",
            "pack what the recurrent layer takes: embed the tokens before they are packed",
        )
    return torch.where(is_valid, value, torch.full((), float("nan"), dtype=value.dtype))


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """What runs in the place of a recurrent layer's own forward; None where that is not torch's."""
    if not isinstance(module, nn.RNNBase) or type(module).forward not in _OWN_FORWARDS:
        return None
    return _forward


def _forward(module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
    rows: Any = input.data if isinstance(input, PackedSequence) else None
    if not isinstance(rows, PackedRows):
        return type(module).forward(module, input, hx)
    if module.proj_size:
        raise UnsupportedError(
            f"a packed sequence in a {type(module).__name__} with proj_size",
            "give it the padded batch, and use the lengths where its result is used",
        )
    x, lengths = held(rows)
    order, back = input.sorted_indices, input.unsorted_indices
    if hx is None:
        shape = module.num_layers * (2 if module.bidirectional else 1), x.shape[1], module.hidden_size
        hx = torch.zeros(shape, dtype=x.dtype)
        state = (hx, hx)
    else:
        both = hx if isinstance(hx, tuple) else (hx, hx)
        state = both if order is None else (both[0].index_select(1, order), both[1].index_select(1, order))
    weights: Any = module._flat_weights
    out, hidden, cell = run_layers(
        _KINDS[module.mode],
        x,
        state,
        weights,
        module.bias,
        module.num_layers,
        float(module.dropout),
        module.training,
        module.bidirectional,
        lengths,
    )
    made: Any = PackedRows(out, lengths)
    packed = PackedSequence(made, input.batch_sizes, order, back)
    if back is not None:
        hidden, cell = hidden.index_select(1, back), cell.index_select(1, back)
    return packed, ((hidden, cell) if module.mode == "LSTM" else hidden)
