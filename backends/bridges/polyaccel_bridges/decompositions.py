"""Which ATen operations the capture takes apart: PyTorch's core set, with what our lowerings want whole or done differently."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten
_NARROW = (torch.float16, torch.bfloat16)
_Tensors = tuple[torch.Tensor, ...]
# PyTorch knows how to take these apart, but leaves them whole in its core set.
_FURTHER = [aten._batch_norm_with_update_functional, aten._batch_norm_no_update, aten.batch_norm_backward]


def capture_decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for `make_fx`. An entry that returns NotImplemented leaves the operation whole."""
    return dict(_table())


@functools.cache  # PyTorch goes through every registered operation to list its own: 75 ms, half of a small capture
def _table() -> dict[Any, Callable[..., Any]]:
    table = {**core_aten_decompositions(), **get_decompositions(_FURTHER)}
    # Decomposed, its second result is not the log-sum-exp that the backward wants, and no fused kernel could serve it.
    table.pop(aten._scaled_dot_product_flash_attention_for_cpu.default, None)
    table[getattr(aten.random, "from")] = (
        _random_from  # fx writes overloads as Python attributes, and `from` is a keyword
    )
    table[aten._weight_norm_interface_backward.default] = _weight_norm_backward
    for operation in _WHOLE_BACKWARDS:
        table[operation] = _unless_narrow(table[operation])
    return table | _WIDE_NORMALIZATIONS


# Taken apart, each is ten to sixteen operations, in every layer: a quarter of a transformer's graph.
_WHOLE_BACKWARDS = (aten.native_layer_norm_backward.default, aten.gelu_backward.default)


def _unless_narrow(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    def decomposed(grad: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return decomposition(grad, input, *args, **kwargs) if input.dtype in _NARROW else NotImplemented

    return decomposed


def _weight_norm_backward(
    grad_w: torch.Tensor, saved_v: torch.Tensor, saved_g: torch.Tensor, saved_norms: torch.Tensor, dim: int
) -> _Tensors:
    # w = g * v / |v|: along v a change of v does nothing.
    norms = saved_norms.to(saved_g.dtype)
    along = (grad_w * saved_v).sum([d for d in range(saved_v.dim()) if d != dim], keepdim=True)
    return (saved_g / norms) * (grad_w - saved_v * (along / (norms * norms))), along / norms


def _random_from(
    self: torch.Tensor, low: int, to: int | None = None, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    if to is None:  # every integer that the dtype holds exactly, counted from 0
        to = int(2 / torch.finfo(self.dtype).eps) + 1 if self.dtype.is_floating_point else torch.iinfo(self.dtype).max
    if generator is not None:
        return torch.randint(low, to, self.shape, dtype=self.dtype, generator=generator)
    return torch.randint(low, to, self.shape, dtype=self.dtype)


# PyTorch's shape functions say that normalizing 16-bit inputs saves 16-bit statistics. Its kernels save 32 bits wherever
# autocast leads to them, and so do we: cast, normalize in 32 bits, cast back. XLA fuses the casts.


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> _Tensors:
    if input.dtype not in _NARROW:
        return NotImplemented
    out, mean, rstd = aten.native_layer_norm.default(input.float(), normalized_shape, _wide(weight), _wide(bias), eps)
    return out.to(input.dtype), mean, rstd


def _group_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> _Tensors:
    if input.dtype not in _NARROW:
        return NotImplemented
    wide = aten.native_group_norm.default(input.float(), _wide(weight), _wide(bias), N, C, HxW, group, eps)
    return wide[0].to(input.dtype), wide[1], wide[2]


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> _Tensors:
    if input.dtype not in _NARROW:
        return NotImplemented
    out, mean, rstd, new_mean, new_var = aten._native_batch_norm_legit_functional.default(
        input.float(), _wide(weight), _wide(bias), running_mean.float(), running_var.float(), training, momentum, eps
    )
    return out.to(input.dtype), mean, rstd, new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)


def _batch_norm_without_statistics(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> _Tensors:
    if input.dtype not in _NARROW:
        return NotImplemented
    out, mean, rstd = aten._native_batch_norm_legit.no_stats(
        input.float(), _wide(weight), _wide(bias), training, momentum, eps
    )
    return out.to(input.dtype), mean, rstd


def _batch_norm_evaluated(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> _Tensors:
    if input.dtype not in _NARROW:
        return NotImplemented
    out, mean, rstd = aten._native_batch_norm_legit_no_training.default(
        input.float(), _wide(weight), _wide(bias), running_mean.float(), running_var.float(), momentum, eps
    )
    return out.to(input.dtype), mean, rstd


_WIDE_NORMALIZATIONS: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_evaluated,
}
