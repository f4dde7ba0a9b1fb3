"""LayerNorm and GroupNorm as formulas: the partitioner leaves each device its own rows of them.

torch_xla 2.9 computes both by XLA's batch norm of one row whose channels are the samples. The partitioner does not cut that operation:
each device gathered the global batch's activations, and normalized all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

_HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def use_formulas() -> torch.library.Library:
    """Compute both in this way from now on, for all XLA tensors of the process but in torch.inference_mode, which knows no autograd.

    What is returned holds the registration.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("layer_norm", layer_norm, "AutogradXLA")
    library.impl("group_norm", group_norm, "AutogradXLA")
    return library


def layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """`aten::layer_norm` of XLA tensors. Raises RuntimeError for shapes that do not fit, as torch does."""
    shape = tuple(shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"layer_norm over the shape {shape} was given an input of shape {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and tuple(value.shape) != shape:
            raise RuntimeError(f"layer_norm over the shape {shape} was given a {name} of shape {tuple(value.shape)}")
    result = _normalized(x, tuple(range(-len(shape), 0)), eps)
    return _scaled(result, weight, bias).to(x.dtype)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """`aten::group_norm` of XLA tensors (batch, channels, ...). Raises RuntimeError for shapes that do not fit, as torch does."""
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise RuntimeError(f"group_norm of {num_groups} groups was given an input of shape {tuple(x.shape)}")
    channels = x.shape[1]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and tuple(value.shape) != (channels,):
            raise RuntimeError(f"group_norm of {channels} channels was given a {name} of shape {tuple(value.shape)}")
    of_a_group = channels // num_groups * math.prod(x.shape[2:])
    result = _normalized(x.reshape(x.shape[0], num_groups, of_a_group), (-1,), eps).reshape(x.shape)
    row = (channels, *[1] * (x.dim() - 2))
    scales = (None if value is None else value.reshape(row) for value in (weight, bias))
    return _scaled(result, *scales).to(x.dtype)


def _normalized(x: torch.Tensor, dims: tuple[int, ...], eps: float) -> torch.Tensor:
    """In float32 where x has half of that: sums of many such values lose digits."""
    wide = x.float() if x.dtype in _HALVES else x
    centred = wide - wide.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
