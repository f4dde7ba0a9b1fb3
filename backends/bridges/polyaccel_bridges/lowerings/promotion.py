"""Torch's type promotion over jax arrays and Python numbers, and the wider dtype in which torch computes a narrow one.

`torch.promote_types` itself decides; this file only sorts operands into torch's three ranks (arrays, 0-d arrays, Python numbers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

DType = np.dtype[Any]
Number = bool | int | float | complex

NUMPY_OF_TORCH: dict[torch.dtype, DType] = {
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: np.dtype(ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_TORCH_OF_NUMPY = {array: tensor for tensor, array in NUMPY_OF_TORCH.items()}

BOOL, UINT8 = np.dtype(np.bool_), np.dtype(np.uint8)
INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_WIDER: dict[DType, DType] = {np.dtype(np.float16): FLOAT32, np.dtype(ml_dtypes.bfloat16): FLOAT32}
_REAL_OF_COMPLEX: dict[DType, DType] = {np.dtype(np.complex64): FLOAT32, np.dtype(np.complex128): FLOAT64}


def numpy_dtype(dtype: torch.dtype) -> DType:
    """The numpy dtype that stores a torch dtype; KeyError for quantized ones and complex32, which have none."""
    return NUMPY_OF_TORCH[dtype]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The inverse of `numpy_dtype`."""
    return _TORCH_OF_NUMPY[np.dtype(dtype)]


def default_dtype() -> DType:
    """What torch gives to floating results that no operand decides."""
    return numpy_dtype(torch.get_default_dtype())


def is_float(dtype: DType) -> bool:
    return torch_dtype(dtype).is_floating_point


def is_complex(dtype: DType) -> bool:
    return torch_dtype(dtype).is_complex


def is_integral(dtype: DType) -> bool:
    """Integers and bool, as torch's `isIntegralType(..., includeBool=true)`."""
    return not (is_float(dtype) or is_complex(dtype))


def real_dtype(dtype: DType) -> DType:
    """float32 for complex64, float64 for complex128, any other dtype itself."""
    return _REAL_OF_COMPLEX.get(dtype, dtype)


def complex_dtype(dtype: DType) -> DType:
    return numpy_dtype(torch_dtype(dtype).to_complex())


def opmath(dtype: DType) -> DType:
    """The dtype in which torch computes: float32 for float16 and bfloat16, rounded once at the end."""
    return _WIDER.get(np.dtype(dtype), np.dtype(dtype))


def is_array(operand: Any) -> bool:
    return hasattr(operand, "dtype")


def dtype_of(operand: Any) -> DType:
    """An array's dtype, or the one that torch gives a Python number."""
    if is_array(operand):
        return np.dtype(operand.dtype)
    if isinstance(operand, bool):
        return BOOL
    if isinstance(operand, int):
        return INT64
    return complex_dtype(default_dtype()) if isinstance(operand, complex) else default_dtype()


@functools.cache
def promote(left: DType, right: DType) -> DType:
    return numpy_dtype(torch.promote_types(torch_dtype(left), torch_dtype(right)))


def _combine(higher: DType | None, lower: DType | None) -> DType | None:
    """Torch's rule across ranks: the higher rank keeps its dtype unless the lower one is of a higher category."""
    if higher is None or lower is None:
        return higher if lower is None else lower
    if is_complex(higher):
        return higher
    if is_float(higher):
        return complex_dtype(higher) if is_complex(lower) else higher
    if higher == BOOL or not is_integral(lower):
        return promote(higher, lower)
    return higher


def result_dtype(*operands: Any) -> DType:
    """The dtype of an elementwise operation over arrays and Python numbers (`None` operands are skipped)."""
    ranks: list[DType | None] = [None, None, None]  # arrays with dims, 0-d arrays, numbers
    for operand in operands:
        if operand is None:
            continue
        rank = 2 if not is_array(operand) else (0 if operand.ndim else 1)
        dtype, seen = dtype_of(operand), ranks[rank]
        ranks[rank] = dtype if seen is None else promote(seen, dtype)
    result = _combine(ranks[0], _combine(ranks[1], ranks[2]))
    if result is None:
        raise ValueError("type promotion needs at least one operand")
    return result


def float_dtype(*operands: Any) -> DType:
    """`result_dtype`, with integers and bool going to torch's default dtype (division, exp, mean, ...)."""
    dtype = result_dtype(*operands)
    return default_dtype() if is_integral(dtype) else dtype


def cast(operand: Any, dtype: DType) -> Any:
    """The operand in `dtype`; integers wrap around and complex drops its imaginary part, as in torch.

    A Python number becomes a numpy scalar, which tracing keeps as a literal instead of a constant buffer.
    """
    if not is_array(operand):
        if isinstance(operand, int) and dtype != BOOL and is_integral(dtype):
            return np.asarray(int(operand) & 0xFFFFFFFFFFFFFFFF, np.uint64).astype(dtype)[()]
        if isinstance(operand, complex) and not is_complex(dtype):
            operand = operand.real if dtype != BOOL else operand != 0
        return np.asarray(operand).astype(dtype)[()]
    if is_complex(operand.dtype) and not is_complex(dtype):
        operand = operand != 0 if dtype == BOOL else jnp.real(operand)
    return operand.astype(dtype)


def compute(function: Callable[..., Any], dtype: DType, *operands: Any) -> jax.Array:
    """`function` over the operands in the dtype torch computes `dtype` in, rounded once to `dtype`.

    Arrays with dims are rounded to `dtype` first, as torch's iterator does; 0-d arrays and numbers keep the wider precision.
    """
    wide = opmath(dtype)

    def operand_in(operand: Any) -> jax.Array:
        if is_array(operand) and operand.ndim:
            operand = cast(operand, dtype)
        return cast(operand, wide)

    result: jax.Array = cast(function(*map(operand_in, operands)), dtype)
    return result
