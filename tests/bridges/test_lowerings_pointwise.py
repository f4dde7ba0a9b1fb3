"""Elementwise lowerings are torch's in value, dtype and shape: on OpInfo's samples by family, and at the edges written out below.

Tolerance: 2e-5 in float32 (other polynomials), one unit in the last place of 16-bit floats; integers, bools, NaN and infinity exactly.
"""

from __future__ import annotations

import pytest
import torch
from lowering_checks import agree, family_agrees
from lowering_harness import Call, call

aten = torch.ops.aten
nan, inf = float("nan"), float("inf")

FAMILIES = ("activations", "casts", "elementwise", "losses", "special")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_lowering_of_the_family_gives_what_torch_gives(family: str) -> None:
    family_agrees(family, FAMILIES)


def floats(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_python_numbers_do_not_widen_a_tensor_of_their_kind() -> None:
    half = floats(1.5, -2.25, dtype=torch.bfloat16)
    agree(
        call(aten.add.Tensor, half, 1.1),  # stays bfloat16; the number enters in float32
        call(aten.mul.Tensor, half, 3),
        call(aten.add.Tensor, ints(1, 2, dtype=torch.int8), 300),  # wraps around
        call(aten.add.Tensor, ints(1, 2), 1.5),  # integers meet a float: the default dtype
        call(aten.add.Tensor, torch.tensor([True, False]), 1),  # bool meets an integer: int64
        call(aten.mul.Tensor, torch.tensor([True, False]), True),
        call(aten.div.Tensor, ints(7, -7), 2),
        call(aten.where.self, torch.tensor([True, False]), floats(1.0, 2.0), torch.tensor(3.0, dtype=torch.float64)),
    )


def test_a_0d_tensor_promotes_only_across_kinds() -> None:
    wide, narrow = torch.tensor(0.1, dtype=torch.float64), floats(1.0, 2.0, dtype=torch.bfloat16)
    agree(
        call(aten.add.Tensor, narrow, wide),
        call(aten.add.Tensor, ints(1, 2, dtype=torch.int8), torch.tensor(1)),
        call(aten.add.Tensor, ints(1, 2), wide),
        call(aten.add.Tensor, torch.tensor(1), wide),
        call(aten.maximum.default, narrow, floats(0.5, 5.0)),
        call(aten.atan2.default, ints(1, 2), ints(3, 4)),
    )


def test_integer_division_and_remainders_round_as_torch_says() -> None:
    a, b = ints(7, -7, 7, -7, 0), ints(2, 2, -2, -2, 5)
    x, y = floats(7.5, -7.5, 7.5, -7.5, -0.0, inf, 1.0), floats(2.0, 2.0, -2.0, -2.0, 3.0, 2.0, inf)
    agree(
        *(
            call(aten.div.Tensor_mode, p, q, rounding_mode=m)
            for p, q in ((a, b), (x, y))
            for m in (None, "floor", "trunc")
        ),
        *(call(op, p, q) for p, q in ((a, b), (x, y)) for op in (aten.remainder.Tensor, aten.fmod.Tensor)),
        call(aten.div.Tensor_mode, floats(1.0, -1.0, 0.0), floats(0.0, 0.0, 0.0), rounding_mode="floor"),
        call(aten.remainder.Scalar, a, -3),
        call(aten.remainder.Scalar_Tensor, 7, b),
        call(aten.fmod.Scalar, x, 2.5),
        call(aten.floor_divide.Scalar, a, 2),
        call(aten.div.Scalar_mode, x, 2.0, rounding_mode="floor"),
    )


def test_powers_of_integers_wrap_and_negative_exponents_truncate() -> None:
    agree(
        call(aten.pow.Tensor_Tensor, ints(2, 3, -1, -1, 1, 10), ints(10, 40, -3, -2, -5, -1)),
        call(aten.pow.Tensor_Scalar, ints(-3, 2), 3),
        call(aten.pow.Tensor_Scalar, ints(-3, 2, dtype=torch.int8), 5),
        call(aten.pow.Tensor_Scalar, floats(-8.0, 4.0, 0.0, inf, nan), 0.5),
        call(aten.pow.Tensor_Scalar, floats(-8.0, 4.0, 0.0, inf, nan), -1),
        call(aten.pow.Tensor_Scalar, floats(-8.0, 4.0, nan), 0),
        call(aten.pow.Tensor_Scalar, floats(-8.0, 4.0), 3.7),
        call(aten.pow.Scalar, 2, ints(0, 3, 62)),
        call(aten.pow.Scalar, 2.5, ints(0, 3)),
    )


def test_shifts_beyond_the_width_are_defined() -> None:
    values, bits = ints(5, -5, 5, -5, 5, 1 << 40), ints(1, 1, 64, 64, -1, 3)
    bytes_, small = ints(200, 3, 255, dtype=torch.uint8), ints(1, 8, 9, dtype=torch.uint8)
    agree(
        *(
            call(op, p, q)
            for p, q in ((values, bits), (bytes_, small))
            for op in (
                aten.bitwise_left_shift.Tensor,
                aten.bitwise_right_shift.Tensor,
                aten.__lshift__.Tensor,
                aten.__rshift__.Tensor,
            )
        ),
        *(
            call(op, values, 3)
            for op in (
                aten.bitwise_left_shift.Tensor_Scalar,
                aten.bitwise_right_shift.Tensor_Scalar,
                aten.__lshift__.Scalar,
                aten.__rshift__.Scalar,
            )
        ),
        call(aten.bitwise_left_shift.Scalar_Tensor, 3, ints(1, 2, 63)),
        call(aten.bitwise_right_shift.Scalar_Tensor, -300, ints(1, 2, 63)),
    )


def test_bit_operations_take_numbers_on_either_side() -> None:
    values = ints(12, -5, 7)
    agree(
        *(call(op, values, 10) for op in (aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar)),
        call(aten.bitwise_and.Scalar_Tensor, 10, values),
        call(aten.bitwise_or.Scalar_Tensor, 10, values),
        call(aten.bitwise_xor.Scalar_Tensor, 10, values),
        call(aten.bitwise_or.Tensor, values, torch.tensor([True, False, True])),
        call(aten.bitwise_xor.Scalar, torch.tensor([True, False]), True),
    )


def test_nan_and_infinity_go_where_torch_sends_them() -> None:
    x = floats(nan, inf, -inf, -0.0, 0.0, 1.5, -2.5)
    y = floats(1.0, nan, 2.0, 0.0, -0.0, nan, inf)
    agree(
        *(call(op, x) for op in (aten.sign.default, aten.isnan.default, aten.isinf.default, aten.signbit.default)),
        *(call(op, x) for op in (aten.relu.default, aten.round.default, aten.trunc.default, aten.frac.default)),
        *(call(op, x) for op in (aten.sgn.default, aten.angle.default, aten.digamma.default, aten.sqrt.default)),
        *(call(op, x, y) for op in (aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default)),
        *(
            call(op, x, y)
            for op in (aten.atan2.default, aten.copysign.Tensor, aten.hypot.default, aten.logaddexp.default)
        ),
        *(call(op, x, y) for op in (aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.ge.Tensor)),
        *(call(op, x, y) for op in (aten.xlogy.Tensor, aten.special_xlog1py.default, aten.heaviside.default)),
        call(aten.clamp.default, x, -1.0, 1.0),
        call(aten.clamp.default, x, 1.0, -1.0),  # min above max: max
        call(aten.clamp_max.default, x, 1),
        call(aten.clamp.default, ints(1, 5), 2.5, None),  # a float bound makes integers floats
        call(aten.nan_to_num.default, x),
        call(aten.nan_to_num.default, x, 1.0, 2.0, -2.0),
        call(aten.threshold.default, x, 0.5, -1.0),
        call(aten.hardtanh.default, x, -1.0, 1.0),
        call(aten.softshrink.default, x, 0.5),
        call(aten.hardshrink.default, x, 0.5),
        call(aten.copysign.Scalar, x, -0.0),
        call(aten.logical_not.default, x),
        call(aten.logical_and.default, x, y),
    )


def test_halves_round_to_even_also_at_decimals() -> None:
    x = floats(0.5, 1.5, 2.5, -0.5, 1234.5678, -0.125)
    agree(
        call(aten.round.default, x),
        *(call(aten.round.decimals, x, decimals=d) for d in (0, 2, -2)),
        call(aten.round.default, ints(15, 25)),
    )


def test_casts_truncate_and_wrap_as_torch_does() -> None:
    x = floats(-1.7, 1.7, 300.2, -129.0)
    agree(
        *(
            call(aten._to_copy.default, x, dtype=d)
            for d in (torch.int64, torch.int32, torch.bfloat16, torch.bool, torch.float64)
        ),
        call(aten._to_copy.default, floats(3.9, 200.0), dtype=torch.uint8),
        call(aten._to_copy.default, ints(-1, 300), dtype=torch.uint8),
        call(aten._to_copy.default, ints(0, 2), dtype=torch.bool),
        call(aten._to_copy.default, torch.tensor([1 + 2j, 0j]), dtype=torch.complex128),
        call(aten._to_copy.default, x),
        call(aten.copy.default, torch.zeros(2, 4, dtype=torch.int64), x),
        call(aten.fill.Tensor, ints(1, 2), torch.tensor(3.7)),
    )


@pytest.mark.parametrize("wanted", [torch.int32, torch.int64, torch.float16, torch.uint8, torch.complex64, torch.bool])
def test_a_view_as_another_dtype_keeps_the_bytes(wanted: torch.dtype) -> None:
    x = torch.ones(2, 4) if wanted is not torch.bool else ints(0, 1, dtype=torch.uint8)
    agree(call(aten.view.dtype, x, wanted), call(aten.view_copy.dtype, x, wanted))
    if wanted is torch.uint8:
        agree(call(aten.view.dtype, torch.arange(16, dtype=torch.uint8), torch.float32))
        agree(call(aten.view.dtype, torch.tensor([True, False]), torch.uint8))
        agree(call(aten.view.dtype, torch.tensor([1 + 2j]), torch.float64))


def test_comparisons_with_numbers_that_the_dtype_cannot_hold() -> None:
    small = ints(1, 127, -128, dtype=torch.int8)
    agree(
        call(aten.eq.Scalar, floats(0.1, 0.2, dtype=torch.bfloat16), 0.1),  # the number is rounded to bfloat16 first
        call(aten.lt.Scalar, ints(1, 2, 3), 2.5),
        call(aten.gt.Scalar, small, 100),
        call(aten.lt.Scalar, small, 300),  # wraps around: 44
        call(aten.ge.Tensor, small, ints(100, 100, 100)),
        call(aten.eq.Scalar, torch.tensor([True, False]), 1),
    )


COPIES = [
    call(aten._conj_copy.default, torch.tensor([1 + 2j, 3 - 1j])),
    call(aten._neg_view.default, floats(1.0, -2.0)),
    call(aten._neg_view_copy.default, floats(1.0, -2.0)),
    call(aten._assert_tensor_metadata.default, floats(1.0), [1], None, torch.float32),
    call(aten.detach_copy.default, floats(1.0)),
    call(aten.lift.default, floats(1.0)),
    call(aten.lift_fresh_copy.default, floats(1.0)),
    call(aten.view_as_real_copy.default, torch.tensor([1 + 2j, 3 - 1j])),
    call(aten.view_as_complex_copy.default, torch.ones(3, 2)),
    *(call(op, 0.5, floats(0.0, 1.0, nan)) for op in (aten.xlogy.Scalar_Self, aten.special_xlog1py.self_scalar)),
    *(call(op, floats(0.0, 1.0, nan), 0.5) for op in (aten.xlogy.Scalar_Other, aten.special_xlog1py.other_scalar)),
    call(aten.special_zeta.self_scalar, 2.0, floats(0.5, 1.0, 3.0)),
    call(aten.special_zeta.other_scalar, floats(1.0, 2.0, 3.0), 0.5),
    call(aten.special_zeta.default, floats(2.0, 3.0, 0.5, 1.0, 2.5), floats(-1.5, -0.5, 1.0, 2.0, -0.5)),
    call(aten.polygamma.default, 2, floats(0.5, -0.5, 3.0)),
]


@pytest.mark.parametrize("one", COPIES, ids=lambda one: str(one.overload))
def test_rarely_met_overloads(one: Call) -> None:
    agree(one)
