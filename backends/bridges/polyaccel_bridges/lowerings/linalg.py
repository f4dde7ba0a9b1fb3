"""Factorizations, solves and what is made of them. A matrix that torch would refuse (singular, not positive) gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch.utils._python_dispatch import _disable_current_modes

from .promotion import INT32, is_complex, opmath, real_dtype
from .table import lowers

aten = torch.ops.aten


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _no_info(matrices: jax.Array) -> jax.Array:
    return jnp.zeros(matrices.shape[:-2], INT32)


def _same_batch(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.broadcast_to(a, (*batch, *a.shape[-2:])), jnp.broadcast_to(b, (*batch, *b.shape[-2:]))


@lowers(aten._linalg_check_errors.default)
def check_errors(info: jax.Array, api_name: str, *, is_matrix: bool) -> None:
    """A compiled program cannot raise; NaN or infinity in the result tells."""


# --- Cholesky ------------------------------------------------------------------------------------------------------------------


@lowers(aten.cholesky.default)
def cholesky(self: jax.Array, upper: bool = False) -> jax.Array:
    factor = lax.linalg.cholesky(_adjoint(jnp.triu(self)) if upper else self, symmetrize_input=False)
    return _adjoint(factor) if upper else factor


@lowers(aten.linalg_cholesky_ex.default)
def cholesky_ex(self: jax.Array, *, upper: bool = False, check_errors: bool = False) -> tuple[jax.Array, jax.Array]:
    factor = cholesky(self, upper)
    failed = jnp.isnan(jnp.real(factor)).any((-1, -2)) & ~jnp.isnan(jnp.real(self)).any((-1, -2))
    return factor, failed.astype(INT32)


@lowers(aten.cholesky_solve.default)
def cholesky_solve(self: jax.Array, input2: jax.Array, upper: bool = False) -> jax.Array:
    lower = _adjoint(input2) if upper else input2
    half = solve_triangular(lower, self, upper=False)
    return solve_triangular(_adjoint(lower), half, upper=True)


@lowers(aten.cholesky_inverse.default)
def cholesky_inverse(self: jax.Array, upper: bool = False) -> jax.Array:
    identity = jnp.broadcast_to(jnp.eye(self.shape[-1], dtype=self.dtype), self.shape)
    return cholesky_solve(identity, self, upper)


# --- triangular ----------------------------------------------------------------------------------------------------------------


@lowers(aten.linalg_solve_triangular.default)
def solve_triangular(
    self: jax.Array, B: jax.Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> jax.Array:
    a, b = _same_batch(self, B)
    if b.size == 0:
        return b
    return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@lowers(aten.triangular_solve.default)
def triangular_solve(
    self: jax.Array, A: jax.Array, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[jax.Array, jax.Array]:
    a, b = _same_batch(A, self)
    if b.size == 0:
        return b, a
    solution = lax.linalg.triangular_solve(
        a, b, left_side=True, lower=not upper, transpose_a=transpose, unit_diagonal=unitriangular
    )
    return solution, a


# --- LU ------------------------------------------------------------------------------------------------------------------------


def _lu(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Packed factors, torch's pivots (counted from 1) and the permutation."""
    factors, pivots, permutation = lax.linalg.lu(matrices)
    return factors, (pivots + 1).astype(INT32), permutation


def _permutation(pivots: jax.Array, rows: int) -> jax.Array:
    return lax.linalg.lu_pivots_to_permutation(pivots - 1, rows)


def _lu_solve(factors: jax.Array, permutation: jax.Array, b: jax.Array, adjoint: bool) -> jax.Array:
    """A X = B or A^H X = B where A[permutation] = L U."""
    if b.size == 0:
        return b
    triangular = lax.linalg.triangular_solve
    if not adjoint:
        b = jnp.take_along_axis(b, permutation[..., None], axis=-2)
        b = triangular(factors, b, left_side=True, lower=True, unit_diagonal=True)
        return triangular(factors, b, left_side=True, lower=False)
    b = triangular(factors, b, left_side=True, lower=False, transpose_a=True, conjugate_a=True)
    b = triangular(factors, b, left_side=True, lower=True, transpose_a=True, conjugate_a=True, unit_diagonal=True)
    return jnp.take_along_axis(b, jnp.argsort(permutation, axis=-1)[..., None], axis=-2)


def _pivots(A: torch.Tensor, *, pivot: bool = True, **kwargs: Any) -> str | None:
    return None if pivot else "jax factors with pivots alone; leave pivot=False out"


@lowers(aten.linalg_lu_factor_ex.default, refuses=_pivots)
def lu_factor_ex(
    A: jax.Array, *, pivot: bool = True, check_errors: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    factors, pivots, _ = _lu(A)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    singular = (diagonal == 0).any(-1)
    info = jnp.where(singular, jnp.argmax(diagonal == 0, axis=-1) + 1, 0).astype(INT32)
    return factors, pivots, info


@lowers(aten.linalg_lu_solve.default)
def lu_solve(LU: jax.Array, pivots: jax.Array, B: jax.Array, *, left: bool = True, adjoint: bool = False) -> jax.Array:
    permutation = _permutation(pivots, LU.shape[-1])
    factors, b = _same_batch(LU, B)
    permutation = jnp.broadcast_to(permutation, (*factors.shape[:-2], permutation.shape[-1]))
    if left:
        return _lu_solve(factors, permutation, b, adjoint)
    # X A = B is A^H X^H = B^H
    return _adjoint(_lu_solve(factors, permutation, _adjoint(b), not adjoint))


def _unpacked(factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = factors.shape[-2:]
    rank = min(rows, columns)
    lower = jnp.tril(factors[..., :rank], -1) + jnp.eye(rows, rank, dtype=factors.dtype)
    return lower, jnp.triu(factors[..., :rank, :])


def _permutation_matrix(permutation: jax.Array, like: jax.Array) -> jax.Array:
    rows = permutation.shape[-1]
    return (jnp.arange(rows, dtype=permutation.dtype)[:, None] == permutation[..., None, :]).astype(like.dtype)


@lowers(aten.lu_unpack.default)
def lu_unpack(
    LU_data: jax.Array, LU_pivots: jax.Array, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P, L and U with A = P L U; what is not asked for is empty."""
    empty = jnp.zeros((0,), LU_data.dtype)
    lower, upper = _unpacked(LU_data) if unpack_data else (empty, empty)
    if not unpack_pivots:
        return empty, lower, upper
    return _permutation_matrix(_permutation(LU_pivots, LU_data.shape[-2]), LU_data), lower, upper


@lowers(aten.linalg_lu.default, refuses=_pivots)
def lu(A: jax.Array, *, pivot: bool = True) -> tuple[jax.Array, jax.Array, jax.Array]:
    factors, _, permutation = _lu(A)
    return (_permutation_matrix(permutation, A), *_unpacked(factors))


# --- solve, inverse, determinant -----------------------------------------------------------------------------------------------


def _factors_transpose(factors_of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether PyTorch factors the transpose of a contiguous real matrix; releases differ, and its backward solves with those factors."""
    with _disable_current_modes():
        factors = factors_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="cpu"))
    return bool(factors[0, 0] == 2.0)  # the pivot of the first column: 3, or of the first row: 2


_SOLVE_TRANSPOSES = _factors_transpose(lambda matrix: aten._linalg_solve_ex.default(matrix, matrix)[1])
_DET_TRANSPOSES = _factors_transpose(lambda matrix: aten._linalg_det.default(matrix)[1])


def _refusal(transposes: bool) -> Callable[..., str | None]:
    def refuses(A: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
        if A.is_contiguous() or not transposes:
            return None
        return "PyTorch factors a matrix that is not contiguous in its own way; call .contiguous() on it first"

    return refuses


def _lu_of(A: jax.Array, transposes: bool) -> tuple[jax.Array, jax.Array, bool]:
    """Factors, pivots, and whether they are those of the transpose."""
    transposed = transposes and not is_complex(A.dtype)
    factors, pivots, _ = _lu(jnp.swapaxes(A, -1, -2) if transposed else A)
    return factors, pivots, transposed


@lowers(aten._linalg_solve_ex.default, refuses=_refusal(_SOLVE_TRANSPOSES))
def solve_ex(
    A: jax.Array, B: jax.Array, *, left: bool = True, check_errors: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Solution, LU, pivots, info."""
    is_vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    b = B[..., None] if is_vector else B
    factors, pivots, transposed = _lu_of(A, _SOLVE_TRANSPOSES)
    solution = lu_solve(factors, pivots, b, left=left or is_vector, adjoint=transposed)
    return solution[..., 0] if is_vector else solution, factors, pivots, _no_info(A)


@lowers(aten.linalg_inv_ex.default)
def inv_ex(A: jax.Array, *, check_errors: bool = False) -> tuple[jax.Array, jax.Array]:
    return jnp.linalg.inv(A), _no_info(A)


def _sign_of_permutation(pivots: jax.Array, dtype: jnp.dtype) -> jax.Array:
    swaps = jnp.sum(pivots != jnp.arange(1, pivots.shape[-1] + 1, dtype=INT32), axis=-1, dtype=INT32)
    return jnp.where(swaps % 2 == 0, 1, -1).astype(dtype)


@lowers(aten._linalg_det.default, refuses=_refusal(_DET_TRANSPOSES))
def det(A: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    factors, pivots, _ = _lu_of(A, _DET_TRANSPOSES)
    product = jnp.prod(jnp.diagonal(factors, axis1=-2, axis2=-1), axis=-1)
    return product * _sign_of_permutation(pivots, A.dtype), factors, pivots


@lowers(aten._linalg_slogdet.default, refuses=_refusal(_DET_TRANSPOSES))
def slogdet(A: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    factors, pivots, _ = _lu_of(A, _DET_TRANSPOSES)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    sign = jnp.prod(jnp.sign(diagonal), axis=-1) * _sign_of_permutation(pivots, A.dtype)
    size = jnp.sum(jnp.log(jnp.abs(diagonal)), axis=-1).astype(real_dtype(A.dtype))
    return sign, size, factors, pivots


# --- orthogonal ----------------------------------------------------------------------------------------------------------------


@lowers(aten.linalg_qr.default)
def qr(A: jax.Array, mode: str = "reduced") -> tuple[jax.Array, jax.Array]:
    if mode == "r":
        return jnp.zeros((0,), A.dtype), jnp.linalg.qr(A, mode="r")
    q, r = jnp.linalg.qr(A, mode=mode)
    return q, r


@lowers(aten.geqrf.default)
def geqrf(self: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R and, below it, the reflectors; their scales."""
    transposed, scales = jnp.linalg.qr(self, mode="raw")
    return jnp.swapaxes(transposed, -1, -2), scales


def _complex_reflectors(A: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
    return (
        "gradients of complex reflectors leave torch's by 2e-3; use linalg.qr, or real matrices"
        if A.is_complex()
        else None
    )


@lowers(aten.ormqr.default, refuses=_complex_reflectors)
def ormqr(
    self: jax.Array, input2: jax.Array, input3: jax.Array, left: bool = True, transpose: bool = False
) -> jax.Array:
    """The whole square Q of the reflectors, or its adjoint, times `input3`."""
    size = self.shape[-2]
    missing = size - input2.shape[-1]
    kept = self[..., : input2.shape[-1]]
    reflectors = jnp.pad(kept, [*[(0, 0)] * (self.ndim - 1), (0, missing)])
    scales = jnp.pad(input2, [*[(0, 0)] * (input2.ndim - 1), (0, missing)])
    q = lax.linalg.householder_product(reflectors, scales)
    q = _adjoint(q) if transpose else q
    return _matmul(q, input3) if left else _matmul(input3, q)


@lowers(aten.linalg_householder_product.default, refuses=_complex_reflectors)
def householder_product(input: jax.Array, tau: jax.Array) -> jax.Array:
    return lax.linalg.householder_product(input, tau)


@lowers(aten._linalg_svd.default)
def svd(
    A: jax.Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not compute_uv:
        empty = jnp.zeros((0,), A.dtype)
        return empty, jnp.linalg.svd(A, compute_uv=False), empty
    u, s, vh = jnp.linalg.svd(A, full_matrices=full_matrices)
    return u, s, vh


@lowers(aten._linalg_eigh.default)
def eigh(A: jax.Array, UPLO: str = "L", compute_v: bool = True) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(A, UPLO=UPLO, symmetrize_input=False)
    return values, vectors if compute_v else jnp.zeros((0,), A.dtype)


@lowers(aten.linalg_pinv.atol_rtol_tensor)
def pinv(
    self: jax.Array, *, atol: jax.Array | None = None, rtol: jax.Array | None = None, hermitian: bool = False
) -> jax.Array:
    """Singular values not above max(atol, rtol * the largest) count as zero."""
    if self.size == 0:
        return jnp.zeros((*self.shape[:-2], self.shape[-1], self.shape[-2]), self.dtype)
    dtype = real_dtype(self.dtype)
    if rtol is None:
        given = jnp.asarray(0, dtype) if atol is None else atol
        rtol = jnp.where(given > 0, 0, max(self.shape[-2:]) * jnp.finfo(dtype).eps).astype(dtype)
    least = jnp.asarray(0, dtype) if atol is None else atol.astype(dtype)
    if hermitian:
        values, vectors = eigh(self)
        left, right, size = vectors, _adjoint(vectors), jnp.abs(values)
    else:
        left, values, right = svd(self)
        size = values
    cutoff = jnp.maximum(least, rtol.astype(dtype) * jnp.max(size, axis=-1))
    inverse = jnp.where(size > cutoff[..., None], 1 / jnp.where(values == 0, 1, values), 0)
    return _matmul(_adjoint(right) * inverse[..., None, :].astype(self.dtype), _adjoint(left))


@lowers(aten.linalg_matrix_exp.default)
def matrix_exp(self: jax.Array) -> jax.Array:
    if self.size == 0:
        return self
    return jax.scipy.linalg.expm(self.astype(opmath(self.dtype))).astype(self.dtype)
