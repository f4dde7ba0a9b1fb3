"""Grouped matrix products against torch, with empty groups and rows that belong to none.

Tolerance 1e-5: float32 sums of at most 16 products in another order.
"""

from __future__ import annotations

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # defines the operations of torch.ops.transformers
from captured_parity import arrays_of, error

from polyaccel_bridges.lowerings import lowering_of

OFFSETS = ([3, 3, 8, 12], [0, 0, 5, 12], [12, 12, 12, 12])


def worst(operation, *operands):
    expected = operation(*operands)
    actual = lowering_of(operation).function(*arrays_of(operands))
    if isinstance(expected, torch.Tensor):
        expected, actual = (expected,), (actual,)
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("offsets", [*OFFSETS, [2, 2, 7, 9]])
def test_the_products_of_transformers_experts_and_their_gradients(offsets):
    torch.manual_seed(0)
    rows, weights, grads = torch.randn(12, 5), torch.randn(4, 5, 6), torch.randn(12, 6)
    offs = torch.tensor(offsets, dtype=torch.int32)
    operations = torch.ops.transformers
    assert worst(operations.grouped_mm_fallback.default, rows, weights, offs) < 1e-5
    assert worst(operations.grouped_mm_fallback_backward.default, rows, weights, offs, grads) < 1e-5


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize(
    ("left", "right"),
    [((12, 8), (4, 8, 16)), ((4, 8, 16), (16, 12)), ((8, 12), (12, 16))],
    ids=["rows", "columns", "sums"],
)
def test_grouped_products_cut_whichever_dim_the_offsets_mean(left, right, offsets):
    torch.manual_seed(0)
    offs = torch.tensor(offsets, dtype=torch.int32)
    assert worst(torch.ops.aten._grouped_mm.default, torch.randn(left), torch.randn(right), offs) < 1e-5


def test_without_offsets_a_grouped_product_is_a_batch_of_products():
    operands = (torch.randn(4, 8, 16), torch.randn(4, 16, 8))
    expected = torch.bmm(*operands)
    assert error(lowering_of(torch.ops.aten._grouped_mm.default).function(*arrays_of(operands)), expected) < 1e-5
