"""Sampling images at computed places: antialiased resizing (two small matrices) and grid sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .matmul import precision_of
from .table import lowers

aten = torch.ops.aten
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def _triangle(x: Matrix) -> Matrix:
    weights: Matrix = np.maximum(1 - np.abs(x), 0)
    return weights


def _keys_cubic(x: Matrix) -> Matrix:
    """Keys' kernel with a = -0.5, as antialiased bicubic resizing uses it (DOI 10.1109/TASSP.1981.1163711)."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _antialias_matrix(
    size: int, out: int, align_corners: bool, factor: float | None, kernel: Callable[[Matrix], Matrix], width: int
) -> Matrix:
    """(out, size) weights of a filter that is as wide as an output pixel, normalized over the input's extent."""
    if align_corners:
        scale = (size - 1) / (out - 1) if out > 1 else 0.0
    else:
        scale = 1 / factor if factor else size / out
    support = width / 2 * max(scale, 1.0)
    centers = scale * (np.arange(out) + 0.5)
    low = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centers + support + 0.5).astype(np.int64), size)
    positions = np.arange(size)
    inside = (positions >= low[:, None]) & (positions < high[:, None])
    weights = kernel((positions - centers[:, None] + 0.5) / max(scale, 1.0)) * inside
    normalized: Matrix = weights / weights.sum(1, keepdims=True)
    return normalized


def _register_antialiased(forward: Any, backward: Any, kernel: Callable[[Matrix], Matrix], width: int) -> None:
    def resize(
        x: jax.Array, size: Sequence[int], align_corners: bool, factors: tuple[float | None, float | None]
    ) -> jax.Array:
        wide = jnp.promote_types(x.dtype, np.float32)
        rows, columns = (
            jnp.asarray(
                _antialias_matrix(x.shape[dim], size[dim - 2], align_corners, factors[dim - 2], kernel, width), wide
            )
            for dim in (2, 3)
        )
        out = jnp.einsum("nchw,ih,jw->ncij", x.astype(wide), rows, columns, precision=precision_of(rows))
        return out.astype(x.dtype)

    @lowers(forward)
    def upsample_aa(
        self: jax.Array,
        output_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None = None,
        scales_w: float | None = None,
    ) -> jax.Array:
        return resize(self, output_size, align_corners, (scales_h, scales_w))

    @lowers(backward)
    def upsample_aa_backward(
        grad_output: jax.Array,
        output_size: Sequence[int],
        input_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None = None,
        scales_w: float | None = None,
    ) -> jax.Array:
        like = jax.ShapeDtypeStruct(tuple(input_size), grad_output.dtype)
        factors = (scales_h, scales_w)
        grad: jax.Array
        (grad,) = jax.linear_transpose(lambda x: resize(x, output_size, align_corners, factors), like)(grad_output)
        return grad


_register_antialiased(aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa_backward.default, _triangle, 2)
_register_antialiased(aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa_backward.default, _keys_cubic, 4)


_BILINEAR, _NEAREST, _BICUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


def _clipped(x: jax.Array, size: int) -> jax.Array:
    """Into [0, size - 1]; no gradient on or beyond the borders, as in torch."""
    zero, top = jnp.zeros_like(x), jnp.full_like(x, size - 1)
    return jnp.where(x <= 0, zero, jnp.where(x >= top, top, x))


def _reflected(x: jax.Array, size: int, align_corners: bool) -> jax.Array:
    low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
    if span == 0:
        return jnp.zeros_like(x)
    low_, span_ = jnp.asarray(low, x.dtype), jnp.asarray(span, x.dtype)
    distance = jnp.where(x < low_, low_ - x, x - low_)
    flips = jax.lax.stop_gradient(jnp.floor(distance / span_))
    extra = distance - flips * span_
    return jnp.where(flips % 2 == 0, extra + low_, span_ - extra + low_)


def _padded(x: jax.Array, size: int, padding_mode: int, align_corners: bool) -> jax.Array:
    if padding_mode == _BORDER:
        return _clipped(x, size)
    if padding_mode == _REFLECTION:
        return _clipped(_reflected(x, size, align_corners), size)
    return x


def _places(grid: jax.Array, sizes: Sequence[int], align_corners: bool) -> list[jax.Array]:
    """Input coordinates along each spatial dim, from a grid in [-1, 1] whose last dim counts the dims backwards."""
    found = []
    for dim, size in enumerate(sizes):
        x = grid[..., len(sizes) - 1 - dim]
        one = jnp.asarray(1, x.dtype)
        if align_corners:
            found.append((x + one) / 2 * jnp.asarray(size - 1, x.dtype))
        else:
            found.append(((x + one) * jnp.asarray(size, x.dtype) - one) / 2)
    return found


def _pick(image: jax.Array, corners: Sequence[jax.Array]) -> jax.Array:
    """(n, c, *sizes) at integer-valued places (n, *out) per dim -> (n, c, *out); 0 outside."""
    inside = jnp.ones(corners[0].shape, np.bool_)
    rows = []
    for corner, size in zip(corners, image.shape[2:], strict=True):
        inside = inside & (corner >= 0) & (corner <= size - 1)
        rows.append(jnp.clip(corner, 0, size - 1).astype(np.int32))
    values = jax.vmap(lambda picture, *where: picture[(slice(None), *where)])(image, *rows)
    return jnp.where(inside[:, None], values, jnp.zeros((), image.dtype))


def _weighted_taps(image: jax.Array, corners: Sequence[Sequence[jax.Array]], weights: Sequence[jax.Array]) -> jax.Array:
    """The sum over taps of weight times image; one gather for all of them. `corners[dim][tap]`, each (n, *out)."""
    values = _pick(image, [jnp.stack(places, 1) for places in corners])  # (n, c, taps, *out)
    return (values * jnp.stack(weights, 1)[:, None]).sum(2)


def _linear_sample(image: jax.Array, places: Sequence[jax.Array]) -> jax.Array:
    floors = [jax.lax.stop_gradient(jnp.floor(x)) for x in places]
    corners: list[list[jax.Array]] = [[] for _ in places]
    weights = []
    for corner in itertools.product((0, 1), repeat=len(places)):
        weight = jnp.ones_like(places[0])
        for dim, (x, floor, up) in enumerate(zip(places, floors, corner, strict=True)):
            part = x - floor
            weight = weight * (part if up else 1 - part)
            corners[dim].append(floor + up)
        weights.append(weight)
    return _weighted_taps(image, corners, weights)


def _cubic_weights(t: jax.Array) -> list[jax.Array]:
    """Of the four neighbours at -1, 0, 1, 2 for a place `t` in [0, 1); Keys' kernel with a = -0.75."""
    a = -0.75

    def near(x: jax.Array) -> jax.Array:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: jax.Array) -> jax.Array:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _cubic_sample(image: jax.Array, places: Sequence[jax.Array], padding_mode: int, align_corners: bool) -> jax.Array:
    floors = [jax.lax.stop_gradient(jnp.floor(x)) for x in places]
    along = [_cubic_weights(x - floor) for x, floor in zip(places, floors, strict=True)]
    corners: list[list[jax.Array]] = [[] for _ in places]
    weights = []
    for offsets in itertools.product(range(4), repeat=len(places)):
        weight = jnp.ones_like(places[0])
        for dim, (floor, offset, size) in enumerate(zip(floors, offsets, image.shape[2:], strict=True)):
            corners[dim].append(_padded(floor + (offset - 1), size, padding_mode, align_corners))
            weight = weight * along[dim][offset]
        weights.append(weight)
    return _weighted_taps(image, corners, weights)


@lowers(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(
    input: jax.Array, grid: jax.Array, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> jax.Array:
    wide = jnp.promote_types(input.dtype, np.float32)
    image, sizes = input.astype(wide), input.shape[2:]
    places = _places(grid.astype(wide), sizes, align_corners)
    if interpolation_mode == _BICUBIC:
        return _cubic_sample(image, places, padding_mode, align_corners).astype(input.dtype)
    places = [_padded(x, size, padding_mode, align_corners) for x, size in zip(places, sizes, strict=True)]
    if interpolation_mode == _NEAREST:
        return _pick(image, [jnp.round(x) for x in places]).astype(input.dtype)
    return _linear_sample(image, places).astype(input.dtype)


@lowers(aten.grid_sampler_2d_backward.default, aten.grid_sampler_3d_backward.default)
def grid_sampler_backward(
    grad_output: jax.Array,
    input: jax.Array,
    grid: jax.Array,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    output_mask: Sequence[bool],
) -> tuple[jax.Array | None, jax.Array | None]:
    config = (interpolation_mode, padding_mode, align_corners)
    grad_input = grad_grid = None
    if output_mask[0]:
        (grad_input,) = jax.linear_transpose(lambda image: grid_sampler(image, grid, *config), input)(grad_output)
    if output_mask[1]:
        (grad_grid,) = jax.vjp(lambda places: grid_sampler(input, places, *config), grid)[1](grad_output)
    return grad_input, grad_grid
