"""Convolutions of one to three spatial dims, plain and transposed, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import torch
from jax import lax

from .matmul import precision_of
from .table import lowers

aten = torch.ops.aten


def _dimension_numbers(ndim: int) -> lax.ConvDimensionNumbers:
    dims = tuple(range(ndim))
    return lax.ConvDimensionNumbers(lhs_spec=dims, rhs_spec=dims, out_spec=dims)


def _expand(values: Sequence[int], count: int) -> list[int]:
    return list(values) * count if len(values) == 1 else list(values)


def _convolve(
    x: jax.Array,
    weight: jax.Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    spatial = x.ndim - 2
    stride, padding, dilation = (_expand(v, spatial) for v in (stride, padding, dilation))
    if not transposed:
        return lax.conv_general_dilated(
            x,
            weight,
            window_strides=stride,
            padding=[(p, p) for p in padding],
            rhs_dilation=dilation,
            dimension_numbers=_dimension_numbers(x.ndim),
            feature_group_count=groups,
            precision=precision_of(x),
        )
    # The gradient of a convolution: the input is spread out by the stride, the kernel is flipped, channels swap per group.
    kernel = weight.shape[2:]
    swapped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    flipped = lax.rev(swapped.reshape(-1, weight.shape[0] // groups, *kernel), tuple(range(2, x.ndim)))
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return lax.conv_general_dilated(
        x,
        flipped,
        window_strides=[1] * spatial,
        padding=[(r, r + extra) for r, extra in zip(reach, _expand(output_padding, spatial), strict=True)],
        lhs_dilation=stride,
        rhs_dilation=dilation,
        dimension_numbers=_dimension_numbers(x.ndim),
        feature_group_count=groups,
        precision=precision_of(x),
    )


@lowers(aten.convolution.default)
def convolution(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    out = _convolve(input, weight, stride, padding, dilation, transposed, output_padding, groups)
    return out if bias is None else out + bias.reshape(-1, *[1] * (out.ndim - 2))


@lowers(aten.convolution_backward.default)
def convolution_backward(
    grad_output: jax.Array,
    input: jax.Array,
    weight: jax.Array,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    config = (stride, padding, dilation, transposed, output_padding, groups)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        (grad_input,) = jax.linear_transpose(lambda x: _convolve(x, weight, *config), input)(grad_output)
    if output_mask[1]:
        (grad_weight,) = jax.linear_transpose(lambda w: _convolve(input, w, *config), weight)(grad_output)
    if output_mask[2]:
        grad_bias = grad_output.sum(
            (0, *range(2, grad_output.ndim))
        )  # 16 bits are summed in 32: naming the dtype would not
    return grad_input, grad_weight, grad_bias
