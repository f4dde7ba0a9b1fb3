"""How operations of a jaxpr carry the labels of dims on, and do their work on a dim that is two. None: the operation needs it as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from jax import lax

from polyaccel_jax.jaxprs import bind
from polyaccel_jax.splits import LENGTH, Labels, Split

Rule = Callable[[Any, list[Split]], list[Split] | None]

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
    neg nextafter not or pow real reduce_precision rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(np.shape(value))


def _union(many: Sequence[Labels]) -> Labels:
    """Per dim the first label that there is."""
    return tuple(next((label for label in labels if label), None) for labels in zip(*many, strict=True))


def _elementwise(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    shape = eqn.outvars[0].aval.shape
    arrays = [one for one in inputs if one.shape]
    if any(len(one.shape) != len(shape) for one in arrays):
        return None
    split = next((one for one in arrays if one.at is not None), None)
    if split is not None and split.at is not None and split.pair is not None:
        if eqn.primitive.name == "sharding_constraint":
            return None
        at = split.at
        parted = [one.parted(at, split.pair if one.shape[at] != 1 else (1, 1)) if one.shape else one for one in inputs]
        if any(one is None for one in parted):
            return None
        inputs = [one for one in parted if one is not None]
    labels = _union([one.labels for one in inputs if one.shape])
    return [Split(out, labels, None if split is None else split.at) for out in bind(eqn, [one.value for one in inputs])]


def _barrier(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    outs = bind(eqn, [one.value for one in inputs])
    return [Split(out, one.labels, one.at) for out, one in zip(outs, inputs, strict=True)]


# -- views -----------------------------------------------------------------------------------------------------------------


def _broadcast(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    shape, dims = tuple(eqn.params["shape"]), tuple(eqn.params["broadcast_dimensions"])
    at = None
    if one.at is not None and one.pair is not None:
        at = dims[one.at]
        shape = (*shape[:at], *one.pair, *shape[at + 1 :])
        dims = tuple(own for dim in dims for own in ((at, at + 1) if dim == at else (dim + (dim > at),)))
    labels: list[str | None] = [None] * len(shape)
    for dim, size, label in zip(dims, _shape(one.value), one.labels, strict=True):
        labels[dim] = label if shape[dim] == size else None
    return [Split(lax.broadcast_in_dim(one.value, shape, dims), tuple(labels), at)]


def _reshape(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    new = tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None:
        return None
    found = _reshaped_pair(one, new)
    if found is None:
        one = one.merged()
        found = new, None
    shape, at = found
    return [Split(lax.reshape(one.value, shape), relabelled(one.labels, _shape(one.value), shape), at)]


def _reshaped_pair(one: Split, new: tuple[int, ...]) -> tuple[tuple[int, ...], int | None] | None:
    """The shape with (batch, length) as two dims, and where they are one for the program; None where the view mixes them with others."""
    own = _shape(one.value)
    if one.at is not None:
        starts = [one.at]
    else:
        starts = [dim for dim in range(len(own) - 1) if one.labels[dim + 1] == LENGTH and own[dim] > 1]
    for start in starts:
        pair, before = own[start : start + 2], prod(own[:start])
        for dim in range(len(new)):
            if prod(new[:dim]) != before:
                continue
            if new[dim] == prod(pair) and new[dim] > 1:
                return (*new[:dim], *pair, *new[dim + 1 :]), dim
            if one.at is not None and new[dim : dim + 2] == pair:
                return new, None
    return (new, None) if one.at is None else None


def relabelled(labels: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
    """The labels of a reshaped array: one stays with the outermost of the dims that were merged or split, and others go."""
    found: list[str | None] = [None] * len(new)
    for mine, other in _groups(old, new):
        outermost = next((dim for dim in mine if old[dim] != 1), None)
        target = next((dim for dim in other if new[dim] != 1), None)
        if outermost is not None and target is not None:
            found[target] = labels[outermost]
    return tuple(found)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dims of two shapes that hold the same number of elements, as short as they can be."""
    first, second = 0, 0
    if 0 in old:
        return
    while first < len(old) or second < len(new):
        mine, other = [first] * (first < len(old)), [second] * (second < len(new))
        first, second = first + len(mine), second + len(other)
        while (left := prod(old[d] for d in mine)) != (right := prod(new[d] for d in other)):
            if left < right:
                mine.append(first)
                first += 1
            else:
                other.append(second)
                second += 1
        yield mine, other


def _transpose(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    permutation = tuple(eqn.params["permutation"])
    own = one.own(permutation)
    at = None if one.at is None else own.index(one.at)
    return [Split(lax.transpose(one.value, own), tuple(one.labels[dim] for dim in own), at)]


def _without(one: Split, dims: Sequence[int]) -> tuple[Labels, int | None]:
    """Labels, and the dim that is two, when these dims of the value have gone."""
    left = [dim for dim in range(len(one.labels)) if dim not in dims]
    return tuple(one.labels[dim] for dim in left), None if one.at is None or one.at in dims else left.index(one.at)


def _reduce(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    if eqn.primitive.name in ("argmax", "argmin") and one.at in eqn.params["axes"]:
        return None
    axes = one.own(eqn.params["axes"])
    out = eqn.primitive.bind(one.value, **{**eqn.params, "axes": axes})
    return [Split(out, *_without(one, axes))]


def _squeeze(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    dims = one.own(eqn.params["dimensions"])
    return [Split(lax.squeeze(one.value, dims), *_without(one, dims))]


def _cumulative(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    axis = one.own_dims(eqn.params["axis"])
    if len(axis) > 1:
        return None
    return [Split(eqn.primitive.bind(one.value, **{**eqn.params, "axis": axis[0]}), one.labels, one.at)]


# -- parts -----------------------------------------------------------------------------------------------------------------


def _where_full(one: Split, shape: Sequence[int]) -> Labels:
    """The labels of the dims that have kept their size."""
    sizes = zip(one.labels, _shape(one.value), shape, strict=True)
    return tuple(label if old == new else None for label, old, new in sizes)


def _slice(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    start, limit = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    strides = list(eqn.params["strides"] or [1] * len(start))
    if one.at is not None and one.pair is not None:
        at = one.at
        if (start[at], limit[at], strides[at]) != (0, prod(one.pair), 1):
            return None
        start[at : at + 1], limit[at : at + 1], strides[at : at + 1] = [0, 0], list(one.pair), [1, 1]
    out = lax.slice(one.value, start, limit, strides)
    return [Split(out, _where_full(one, _shape(out)), one.at)]


def _dynamic_slice(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    one = inputs[0]
    if one.at is not None:
        return None
    (out,) = bind(eqn, [given.value for given in inputs])
    return [Split(out, _where_full(one, _shape(out)))]


def _pad(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    one, filler = inputs
    config = list(eqn.params["padding_config"])
    if one.at is not None:
        if tuple(config[one.at]) != (0, 0, 0):
            return None
        config[one.at : one.at + 1] = [(0, 0, 0), (0, 0, 0)]
    out = lax.pad(one.value, filler.value, config)
    return [Split(out, _where_full(one, _shape(out)), one.at)]


def _split(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    (one,) = inputs
    axis = one.own_dims(eqn.params["axis"])
    if len(axis) > 1:
        return None
    outs = eqn.primitive.bind(one.value, **{**eqn.params, "axis": axis[0]})
    return [Split(out, _where_full(one, _shape(out)), one.at) for out in outs]


def _concatenate(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    dimension = eqn.params["dimension"]
    split = next((one for one in inputs if one.at is not None), None)
    if split is not None and split.at is not None and split.pair is not None:
        if split.at == dimension:
            return None
        parted = [one.parted(split.at, split.pair) for one in inputs]
        if any(one is None for one in parted):
            return None
        inputs = [one for one in parted if one is not None]
        (dimension,) = split.own_dims(dimension)
    out = lax.concatenate([one.value for one in inputs], dimension)
    labels = list(_union([one.labels for one in inputs]))
    labels[dimension] = None
    return [Split(out, tuple(labels), None if split is None else split.at)]


# -- products and look-ups -------------------------------------------------------------------------------------------------


def _dot_general(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    left, right = inputs
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    for mine, other in (*zip(left_sum, right_sum, strict=True), *zip(left_batch, right_batch, strict=True)):
        if left.at == mine and left.pair is not None:
            right = right.parted(other, left.pair) or right.merged().parted(other, left.pair) or right
        elif right.at == other and right.pair is not None:
            left = left.parted(mine, right.pair) or left.merged().parted(mine, right.pair) or left
    left_free = [dim for dim in range(len(left.shape)) if dim not in (*left_sum, *left_batch)]
    right_free = [dim for dim in range(len(right.shape)) if dim not in (*right_sum, *right_batch)]
    if left.at in left_free and right.at in right_free:
        right = right.merged()
    numbers = ((left.own(left_sum), right.own(right_sum)), (left.own(left_batch), right.own(right_batch)))
    out = eqn.primitive.bind(left.value, right.value, **{**eqn.params, "dimension_numbers": numbers})
    dims = [(left, dim) for dim in left.own((*left_batch, *left_free))] + [
        (right, dim) for dim in right.own(right_free)
    ]
    from_right = dict(zip(left.own(left_batch), right.own(right_batch), strict=True))
    labels = [
        one.labels[dim] or (right.labels[from_right[dim]] if one is left and dim in from_right else None)
        for one, dim in dims
    ]
    kept = (*left_batch, *left_free)
    at = next(
        (
            index
            for index, (one, dim) in enumerate(dims)
            if dim == one.at and (one is right or one.at in left.own(kept))
        ),
        None,
    )
    return [Split(out, tuple(labels), at)]


def _gather(eqn: Any, inputs: list[Split]) -> list[Split] | None:
    table, index = inputs
    numbers = eqn.params["dimension_numbers"]
    batching = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    for mine, other in batching:
        if table.at == mine and table.pair is not None and index.at is None:
            index = index.parted(other, table.pair) or index
        elif index.at == other and index.pair is not None and table.at is None:
            table = table.parted(mine, index.pair) or table
    of_batch = dict(batching)
    if table.at is not None and (
        table.at not in of_batch or index.at != of_batch[table.at] or index.pair != table.pair
    ):
        return None
    if index.at is not None and (index.at in of_batch.values()) != (table.at is not None):
        return None
    offset, rank = numbers.offset_dims, len(eqn.outvars[0].aval.shape)
    places = [dim for dim in range(rank) if dim not in offset]  # of the indices' dims in the result
    at = None if index.at is None else places[index.at]
    sizes = list(eqn.params["slice_sizes"])
    if table.at is not None:
        sizes[table.at : table.at + 1] = [1, 1]
    collapsed = table.own(numbers.collapsed_slice_dims)
    new = lax.GatherDimensionNumbers(
        offset_dims=tuple(dim + (at is not None and dim > at) for dim in offset),
        collapsed_slice_dims=collapsed,
        start_index_map=table.own(numbers.start_index_map),
        operand_batching_dims=table.own(numbers.operand_batching_dims),
        start_indices_batching_dims=index.own(numbers.start_indices_batching_dims),
    )
    params = {**eqn.params, "dimension_numbers": new, "slice_sizes": tuple(sizes)}
    out = eqn.primitive.bind(table.value, index.value, **params)
    windows = [dim for dim in range(len(table.labels)) if dim not in (*collapsed, *new.operand_batching_dims)]
    of_windows = iter([table.labels[d] if sizes[d] == _shape(table.value)[d] else None for d in windows])
    of_table = dict(zip(new.start_indices_batching_dims, new.operand_batching_dims, strict=True))
    of_index = iter(
        [label or (table.labels[of_table[dim]] if dim in of_table else None) for dim, label in enumerate(index.labels)]
    )
    labels = tuple(next(of_windows) if dim in new.offset_dims else next(of_index) for dim in range(len(_shape(out))))
    return [Split(out, labels, at)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduce,
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
