"""Reading and writing at computed positions: index, gather, scatter and masks.

Torch's indices are in range or an error, so nothing is masked here (XLA's cheapest mode).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import BOOL, INT32, INT64, Number, cast, is_float, is_integral, opmath
from .table import lowers
from .views import wrapped

aten = torch.ops.aten
Indices = Sequence[jax.Array | None]


def _index(x: jax.Array, dim_size: int, *, wraps: bool = False) -> jax.Array:
    """Indices in int32 where they fit (int64 addresses are slow on accelerators); `wraps` lets negative ones count from the end."""
    if wraps:
        x = jnp.where(x < 0, x + np.asarray(dim_size, x.dtype), x)
    return x.astype(INT32) if dim_size < 2**31 else x.astype(INT64)


def _is_mask(index: jax.Array | None) -> bool:
    return index is not None and index.dtype in (np.bool_, np.uint8)


def _advanced(shape: Sequence[int], indices: Indices) -> tuple[Any, ...]:
    """The numpy form of ATen's list of optional index tensors."""
    return tuple(
        slice(None) if index is None else _index(index, shape[dim], wraps=True) for dim, index in enumerate(indices)
    )


def _needs_integers(self: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> str | None:
    if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    return "it is indexed by a boolean mask, so its shape depends on values; use torch.where, or multiply by the mask"


def _needs_one_mask(
    self: torch.Tensor, indices: Sequence[torch.Tensor | None], *args: Any, **kwargs: Any
) -> str | None:
    if sum(index is not None for index in indices) == 1:
        return None
    reason = _needs_integers(self, indices)
    return reason and "a boolean mask is combined with other indices; use torch.where"


@lowers(aten.index.Tensor, aten._unsafe_index.Tensor, refuses=_needs_integers)
def index(self: jax.Array, indices: Indices) -> jax.Array:
    return self.at[_advanced(self.shape, indices)].get(mode="promise_in_bounds")


def _masked_put(x: jax.Array, lead: int, mask: jax.Array, values: jax.Array, accumulate: bool) -> jax.Array:
    """`x[:, ..., mask] = values`, `lead` dims before the mask: a `where`, with one value per true element looked up by its rank."""
    mask, rest = cast(mask, BOOL), x.ndim - lead - mask.ndim
    full_mask = mask.reshape((1,) * lead + mask.shape + (1,) * rest)
    if values.ndim > rest and values.shape[-1 - rest] != 1:
        rank = jnp.cumsum(mask.reshape(-1), dtype=INT32) - 1
        axis = values.ndim - 1 - rest
        values = jnp.take(values, jnp.maximum(rank, 0), axis=axis, mode="clip")
    elif values.ndim > rest:
        values = jnp.squeeze(values, -1 - rest)
        values = values.reshape(
            values.shape[: values.ndim - rest] + (1,) * mask.ndim + values.shape[values.ndim - rest :]
        )
        return jnp.where(full_mask, x + values if accumulate else values, x)
    if values.ndim > rest:
        values = values.reshape(values.shape[:axis] + mask.shape + values.shape[axis + 1 :])
    return jnp.where(full_mask, x + values if accumulate else values, x)


@lowers(aten.index_put.default, aten._unsafe_index_put.default, refuses=_needs_one_mask)
def index_put(self: jax.Array, indices: Indices, values: jax.Array, accumulate: bool = False) -> jax.Array:
    values = cast(values, self.dtype)
    used = [dim for dim, entry in enumerate(indices) if entry is not None]
    if len(used) == 1 and _is_mask(indices[used[0]]):
        return _masked_put(self, used[0], indices[used[0]], values, accumulate)  # type: ignore[arg-type]
    where = _advanced(self.shape, indices)
    if not accumulate:
        return self.at[where].set(values, mode="promise_in_bounds")
    if self.dtype == BOOL:
        return self.at[where].max(values, mode="promise_in_bounds")
    # many rows can land on one: narrow floats would lose the small ones
    wide = opmath(self.dtype)
    return self.astype(wide).at[where].add(values.astype(wide), mode="promise_in_bounds").astype(self.dtype)


def _along(x: jax.Array, dim: int, positions: jax.Array) -> tuple[Any, ...]:
    return (slice(None),) * dim + (_index(positions, x.shape[dim]),)


@lowers(aten.index_select.default)
def index_select(self: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    if self.ndim == 0:
        return self
    dim = wrapped(dim, self.ndim)
    return self.at[_along(self, dim, index.reshape(-1))].get(mode="promise_in_bounds")


@lowers(aten.index_add.default)
def index_add(self: jax.Array, dim: int, index: jax.Array, source: jax.Array, *, alpha: Number = 1) -> jax.Array:
    if self.ndim == 0:
        return index_add(self.reshape(1), 0, index, source.reshape(1), alpha=alpha).reshape(())
    dim = wrapped(dim, self.ndim)
    if self.dtype == BOOL:
        return self.at[_along(self, dim, index.reshape(-1))].max(source & bool(alpha))
    wide = opmath(self.dtype)
    added = self.astype(wide).at[_along(self, dim, index.reshape(-1))].add(source.astype(wide) * cast(alpha, wide))
    return added.astype(self.dtype)


@lowers(aten.index_copy.default)
def index_copy(self: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    if self.ndim == 0:
        return source.reshape(())
    dim = wrapped(dim, self.ndim)
    return self.at[_along(self, dim, index.reshape(-1))].set(cast(source, self.dtype))


@lowers(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(self: jax.Array, dim: int, index: jax.Array, value: Number | jax.Array) -> jax.Array:
    if self.ndim == 0:
        return jnp.broadcast_to(cast(value, self.dtype), ())
    dim = wrapped(dim, self.ndim)
    return self.at[_along(self, dim, index.reshape(-1))].set(cast(value, self.dtype))


# --- gather and scatter --------------------------------------------------------------------------------------------------------


def _leading(x: jax.Array, shape: Sequence[int], dim: int | None = None) -> jax.Array:
    """The corner of `x` that an index of `shape` addresses; `dim` stays whole."""
    if all(have == want or i == dim for i, (have, want) in enumerate(zip(x.shape, shape, strict=True))):
        return x
    return x[tuple(slice(None) if i == dim else slice(0, length) for i, length in enumerate(shape))]


@lowers(aten.gather.default)
def gather(self: jax.Array, dim: int, index: jax.Array, *, sparse_grad: bool = False) -> jax.Array:
    if self.ndim == 0:
        return jnp.broadcast_to(self, index.shape)
    if index.ndim == 0:
        index = index.reshape(1)
        return gather(self, dim, index).reshape(())
    if index.size == 0:
        return jnp.zeros(index.shape, self.dtype)
    dim = wrapped(dim, self.ndim)
    source = _leading(self, index.shape, dim)

    def gathered(source: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(source, _index(index, self.shape[dim]), axis=dim, mode="promise_in_bounds")

    if self.dtype == BOOL or not _is_one_per_line(source, dim, index):
        return gathered(source, index)
    found: jax.Array = lax.platform_dependent(source, index, tpu=partial(_compared, dim), default=gathered)
    return found


def _compared(dim: int, source: jax.Array, index: jax.Array) -> jax.Array:
    """One element of each line along `dim`, as a sum over that element and zeros: it fuses, where a gather does not.

    With a gather XLA:TPU keeps the array that is read, which is the logarithm of every probability in a cross entropy: 0.8 GB
    for 4,096 targets among 50,257 words, and that program takes twice as long to compile.
    """
    here = lax.broadcasted_iota(INT32, source.shape, dim) == index.astype(INT32)
    return jnp.sum(jnp.where(here, source, cast(0, source.dtype)), axis=dim, keepdims=True, dtype=source.dtype)


def _is_one_per_line(x: jax.Array, dim: int, index: jax.Array) -> bool:
    return x.ndim > 0 and index.shape == tuple(1 if i == dim else length for i, length in enumerate(x.shape))


def _one_per_line(x: jax.Array, dim: int, index: jax.Array) -> jax.Array | None:
    """Where each line along `dim` gets exactly one element: the mask of these elements, which fuses where a scatter does not."""
    if not _is_one_per_line(x, dim, index):
        return None
    return lax.broadcasted_iota(INT32, x.shape, dim) == index.astype(INT32)


def _positions(x: jax.Array, dim: int, index: jax.Array) -> tuple[jax.Array, ...]:
    grid = (lax.broadcasted_iota(INT32, index.shape, i) for i in range(index.ndim))
    return tuple(_index(index, x.shape[dim]) if i == dim else lines for i, lines in enumerate(grid))


def _as_1d(x: jax.Array, index: jax.Array, src: Any) -> tuple[jax.Array, jax.Array, Any]:
    """0-d tensors scatter as tensors of one element."""
    return (
        x.reshape(1) if x.ndim == 0 else x,
        index.reshape(1) if index.ndim == 0 else index,
        src.reshape(1) if hasattr(src, "ndim") and src.ndim == 0 else src,
    )


def _on_bools(reduce: str) -> str:
    """A sum of bools is their disjunction and a product their conjunction; XLA has both as extremes."""
    return {"add": "max", "multiply": "min"}.get(reduce, reduce)


def _scatter(x: jax.Array, dim: int, index: jax.Array, src: Any, reduce: str) -> jax.Array:
    """`src` is a number's array without dims or an array that covers the index."""
    shape = x.shape
    is_number = not hasattr(src, "shape") or src.shape == () != index.shape
    x, index, src = _as_1d(x, index, src)
    if index.size == 0:
        return x.reshape(shape)
    dim = wrapped(dim, x.ndim)
    src = cast(src, x.dtype)
    if not is_number:
        src = _leading(src, index.shape)
    here = _one_per_line(x, dim, index)
    if here is not None and reduce in ("set", "add"):
        summed = src if reduce == "set" else (x | src if x.dtype == BOOL else x + src)
        return jnp.where(here, summed, x).reshape(shape)
    wide = opmath(x.dtype) if reduce in ("add", "multiply") else x.dtype
    target = x.astype(wide).at[_positions(x, dim, index)]
    values = jnp.broadcast_to(jnp.asarray(src, wide), index.shape)
    written = getattr(target, _on_bools(reduce) if x.dtype == BOOL else reduce)(values, mode="promise_in_bounds")
    return written.astype(x.dtype).reshape(shape)


@lowers(aten.scatter.src, aten.scatter.value)
def scatter(
    self: jax.Array, dim: int, index: jax.Array, src: jax.Array | None = None, value: Number | None = None
) -> jax.Array:
    return _scatter(self, dim, index, value if src is None else src, "set")


@lowers(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with_reduce(
    self: jax.Array,
    dim: int,
    index: jax.Array,
    src: Any = None,
    value: Number | None = None,
    *,
    reduce: str,
) -> jax.Array:
    return _scatter(self, dim, index, value if src is None else src, reduce)


@lowers(aten.scatter_add.default)
def scatter_add(self: jax.Array, dim: int, index: jax.Array, src: jax.Array) -> jax.Array:
    return _scatter(self, dim, index, src, "add")


_METHODS = {"sum": "add", "mean": "add", "prod": "multiply", "amax": "max", "amin": "min"}


def _identity(dtype: np.dtype[Any], reduce: str) -> Any:
    """The value that a reduction starts from when the old element does not take part."""
    if reduce in ("sum", "mean"):
        return cast(0, dtype)
    if reduce == "prod":
        return cast(1, dtype)
    sign = -1 if reduce == "amax" else 1
    if dtype == BOOL:
        return cast(reduce == "amin", dtype)
    if is_float(dtype):
        return cast(sign * float("inf"), dtype)
    limits = np.iinfo(dtype)
    return cast(limits.min if sign < 0 else limits.max, dtype)


def _reduced(target: Any, x: jax.Array, values: jax.Array, reduce: str, include_self: bool) -> jax.Array:
    """`target(array)` is the `.at[...]` of the written positions."""
    wide = opmath(x.dtype) if reduce in ("sum", "mean", "prod") else np.dtype(x.dtype)
    start = x if include_self else target(x).set(_identity(np.dtype(x.dtype), reduce))
    method = _on_bools(_METHODS[reduce]) if x.dtype == BOOL else _METHODS[reduce]
    written = getattr(target(start.astype(wide)), method)(values.astype(wide))
    if reduce == "mean":
        ones = jnp.ones(x.shape, wide)
        count = target(ones if include_self else target(ones).set(cast(0, wide))).add(cast(1, wide))
        count = jnp.maximum(count, cast(1, wide))
        written = jnp.floor_divide(written, count) if is_integral(wide) else written / count
    return written.astype(x.dtype)


@lowers(aten.scatter_reduce.two)
def scatter_reduce(
    self: jax.Array, dim: int, index: jax.Array, src: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    x, index, src = _as_1d(self, index, src)
    if index.size == 0:
        return self
    positions = _positions(x, wrapped(dim, x.ndim), index)
    written = _reduced(lambda array: array.at[positions], x, _leading(src, index.shape), reduce, include_self)
    return written.reshape(self.shape)


@lowers(aten.index_reduce.default)
def index_reduce(
    self: jax.Array, dim: int, index: jax.Array, source: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    x, index, source = _as_1d(self, index, source)
    where = _along(x, wrapped(dim, x.ndim), index)
    return _reduced(lambda array: array.at[where], x, source, reduce, include_self).reshape(self.shape)


@lowers(aten.take.default)
def take(self: jax.Array, index: jax.Array) -> jax.Array:
    return self.reshape(-1).at[_index(index, self.size, wraps=True)].get(mode="promise_in_bounds")


@lowers(aten.put.default)
def put(self: jax.Array, index: jax.Array, source: jax.Array, accumulate: bool = False) -> jax.Array:
    if index.size == 0:
        return self
    target = self.reshape(-1).at[_index(index, self.size, wraps=True).reshape(-1)]
    values = source.reshape(-1)
    if not accumulate:
        return target.set(values).reshape(self.shape)
    return (target.max(values) if self.dtype == BOOL else target.add(values)).reshape(self.shape)


# --- masks ---------------------------------------------------------------------------------------------------------------------


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(self: jax.Array, mask: jax.Array, value: Number | jax.Array) -> jax.Array:
    return jnp.where(cast(mask, BOOL), cast(value, self.dtype), self)


@lowers(aten.masked_scatter.default)
def masked_scatter(self: jax.Array, mask: jax.Array, source: jax.Array) -> jax.Array:
    """The n-th true element takes the n-th element of the flattened source."""
    mask, target = jnp.broadcast_arrays(cast(mask, BOOL), self)
    if source.size == 0:
        return target
    rank = jnp.cumsum(mask.reshape(-1), dtype=INT32) - 1
    chosen = jnp.take(source.reshape(-1), jnp.maximum(rank, 0), mode="clip").reshape(target.shape)
    return jnp.where(mask, chosen, target)


@lowers(aten.masked_scatter_backward.default)
def masked_scatter_backward(grad_output: jax.Array, mask: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The gradients of the true elements in order, then zeros."""
    mask = jnp.broadcast_to(cast(mask, BOOL), grad_output.shape).reshape(-1)
    count = int(np.prod(sizes))
    rank = jnp.where(mask, jnp.cumsum(mask, dtype=INT32) - 1, count)  # what is not chosen falls off the end
    return jnp.zeros(count, grad_output.dtype).at[rank].set(grad_output.reshape(-1), mode="drop").reshape(tuple(sizes))


@lowers(aten._unsafe_masked_index.default)
def unsafe_masked_index(self: jax.Array, mask: jax.Array, indices: Indices, fill: Number) -> jax.Array:
    clamped = [None if i is None else jnp.clip(i, 0, self.shape[dim] - 1) for dim, i in enumerate(indices)]
    return jnp.where(mask, index(self, clamped), cast(fill, self.dtype))


@lowers(aten.nonzero_static.default)
def nonzero_static(self: jax.Array, *, size: int, fill_value: int = -1) -> jax.Array:
    if self.ndim == 0:
        return jnp.zeros((size, 0), INT64)
    found = jnp.nonzero(self, size=size, fill_value=fill_value)
    return jnp.stack(found, axis=-1).astype(INT64)
