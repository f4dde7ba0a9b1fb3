"""When a lowering's result counts as torch's: dtype and shape always, values within a tolerance that the dtype explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lowering_harness import Call, Outcome, to_numpy
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
Array = np.ndarray[Any, Any]

# float32 on both sides: other polynomials and other orders of summation. bfloat16, float16: one unit in the last place.
TOLERANCE = {
    "float32": 2e-5,
    "complex64": 2e-5,
    "float64": 1e-9,
    "complex128": 1e-9,
    "bfloat16": 2**-7,
    "float16": 2**-10,
}

# Values that torch leaves undefined; shape and dtype still count.
UNDEFINED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_permuted.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


def difference(outcome: Outcome) -> str | None:
    """Why the lowering's result is not torch's, or None."""
    call = outcome.call
    if outcome.error is not None:
        return f"{type(outcome.error).__name__}: {outcome.error}"
    wanted = [to_numpy(leaf) for leaf in tree_flatten(call.result)[0] if isinstance(leaf, torch.Tensor)]
    given = [leaf for leaf in tree_flatten(outcome.result)[0] if leaf is not None]
    if len(wanted) != len(given):
        return f"{len(given)} arrays instead of {len(wanted)}"
    for want, have in zip(wanted, given, strict=True):
        if have.dtype != want.dtype or have.shape != want.shape:
            return f"{have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    if call.overload in UNDEFINED or all(_is_close(*pair) for pair in zip(wanted, given, strict=True)):
        return None
    if call.overload in EQUIVALENT:
        return EQUIVALENT[call.overload](call, wanted, given)
    if _is_as_exact_as_torch(call, wanted, given):
        return None
    return "; ".join(_distance(want, have) for want, have in zip(wanted, given, strict=True))


def _is_close(want: Array, have: Array) -> bool:
    return scaled_error(want, have) <= TOLERANCE.get(want.dtype.name, 0.0)


def scaled_error(want: Array, have: Array) -> float:
    """The largest difference, each relative to its value plus the array's largest value (at most 1): sums that cancel are near zero.

    Infinite where infinities, NaN or values that have no rounding (integers, bools) differ.
    """
    if want.dtype.name not in TOLERANCE:
        return 0.0 if np.array_equal(want, have) else np.inf
    a, b = exact(want), exact(have)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return np.inf
    a, b = a[finite], b[finite]
    sizes = np.abs(a)
    floor = min(1.0, float(sizes.max(initial=0.0)) or 1.0)
    return float((np.abs(a - b) / (floor + sizes)).max(initial=0.0))


def exact(values: Array) -> Array:
    """In 64 bits, real or complex."""
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _distance(want: Array, have: Array) -> str:
    if want.dtype.kind in "biu":
        return f"{int((want != have).sum())} of {want.size} values differ"
    with np.errstate(all="ignore"):
        gap = np.abs(exact(want) - exact(have))
    return f"largest difference {np.nanmax(gap, initial=0):.2e} at {np.nanmax(np.abs(exact(want)), initial=0):.2e}"


def _is_as_exact_as_torch(call: Call, wanted: list[Array], given: list[Array]) -> bool:
    """Long sums are rounded differently; then the float64 result decides: the lowering may be twice as far from it as torch is."""

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point:
            return leaf.double()
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    try:
        result = call.overload(*tree_map(widened, call.args), **tree_map(widened, call.kwargs))
    except RuntimeError:
        return False  # no float64 kernel
    truths = [to_numpy(leaf) for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
    return as_exact_as(wanted, given, truths)


def as_exact_as(wanted: list[Array], given: list[Array], truths: list[Array], noise: float = 0.0) -> bool:
    """Whether `given` is at most twice as far from the `truths` (the same computation in float64) as `wanted` is, plus `noise`."""
    if [truth.shape for truth in truths] != [want.shape for want in wanted]:
        return False
    for want, have, truth in zip(map(exact, wanted), map(exact, given), map(exact, truths), strict=True):
        finite = np.isfinite(want)
        if not np.array_equal(finite, np.isfinite(have)) or not np.array_equal(
            want[~finite], have[~finite], equal_nan=True
        ):
            return False
        theirs, ours = (np.abs(x[finite] - truth[finite]).max(initial=0.0) for x in (want, have))
        step = max(TOLERANCE.get(x.dtype.name, 0.0) for x in wanted) * np.abs(truth[finite]).max(initial=0.0)
        if not ours <= 2 * theirs + step + noise:
            return False
    return True


# --- results of which there is more than one -----------------------------------------------------------------------------------


def _selects(call: Call, wanted: list[Array], given: list[Array]) -> str | None:
    """Values and indices: the values must be torch's, and each index must point at such a value (equal ones are interchangeable)."""
    values, indices = given
    if not _is_close(wanted[0], values):
        return f"values: {_distance(wanted[0], values)}"
    schema = [argument.name for argument in call.overload._schema.arguments]
    bound = {**dict(zip(schema, call.args, strict=False)), **call.kwargs}
    dim = bound.get("dim", -1)
    source = to_numpy(bound["self"])
    if values.ndim < source.ndim:
        values, indices = np.expand_dims(values, dim), np.expand_dims(indices, dim)
    pointed = np.take_along_axis(source, indices, axis=dim)
    if not np.array_equal(exact(pointed), exact(values), equal_nan=True):
        return "an index does not point at its value"
    if (np.diff(np.sort(indices, axis=dim), axis=dim) == 0).any():
        return "an index is used twice"
    return None


def _sums_bags(call: Call, wanted: list[Array], given: list[Array]) -> str | None:
    """In mode 0 (sum) torch leaves the sizes and the positions of the largest elements as it finds them."""
    if len(call.args) > 4 and call.args[4] == 0 and all(map(_is_close, wanted[:2], given[:2])):
        return None
    return "; ".join(map(_distance, wanted, given))


def _rebuilds_svd(call: Call, wanted: list[Array], given: list[Array]) -> str | None:
    u, s, vh = given
    if not _is_close(wanted[1], s):
        return f"singular values: {_distance(wanted[1], s)}"
    rank = s.shape[-1]
    return _rebuilt(call, (u[..., :rank] * s[..., None, :]) @ vh[..., :rank, :], (u, vh))


def _rebuilds_eigh(call: Call, wanted: list[Array], given: list[Array]) -> str | None:
    w, v = given
    if not _is_close(wanted[0], w):
        return f"eigenvalues: {_distance(wanted[0], w)}"
    source = to_numpy(call.args[0])
    lower = np.tril(source) if call.args[1:] != ("U",) else np.triu(source).conj().swapaxes(-1, -2)
    hermitian = lower + np.tril(lower, -1).conj().swapaxes(-1, -2)
    rebuilt = (v * w[..., None, :]) @ v.conj().swapaxes(-1, -2)
    return None if _is_close(hermitian, rebuilt) else f"V diag(w) V^H: {_distance(hermitian, rebuilt)}"


def _rebuilt(call: Call, product: Array, unitary: tuple[Array, ...]) -> str | None:
    source = to_numpy(call.args[0])
    if not _is_close(source, product.astype(source.dtype)):
        return f"the product of the factors: {_distance(source, product)}"
    for matrix in unitary:
        tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.swapaxes(-1, -2)
        identity = np.broadcast_to(np.eye(tall.shape[-1]), (*tall.shape[:-2], tall.shape[-1], tall.shape[-1]))
        if not np.allclose(tall.conj().swapaxes(-1, -2) @ tall, identity, atol=1e-4):
            return "a factor is not unitary"
    return None


# Equal elements may stand in any order, and singular and eigenvectors have free phases.
EQUIVALENT: dict[Any, Callable[[Call, list[Array], list[Array]], str | None]] = {
    aten.sort.default: _selects,
    aten.topk.default: _selects,
    aten.kthvalue.default: _selects,
    aten.median.dim: _selects,
    aten.nanmedian.dim: _selects,
    aten.mode.default: _selects,
    aten._embedding_bag.default: _sums_bags,
    aten._linalg_svd.default: _rebuilds_svd,
    aten._linalg_eigh.default: _rebuilds_eigh,
}
