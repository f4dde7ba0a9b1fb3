"""docs/operations.md says what operations.json says, and a fixed part of PyTorch's database still gives what stands there.

`scripts/coverage operations` runs all of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import operations_table as table
import pytest
import torch
from lowering_checks import listed
from operations_check import check
from operations_page import HERE, page

from polyaccel_bridges.lowerings import LOWERINGS, Lowering

aten = torch.ops.aten
# One of each kind: values, gradients that repeat, masks, positions, factors, random draws, refusals, forms of our own.
CHOSEN = (
    "add", "cumsum", "fft.rfft", "gather", "index_add", "index_put", "linalg.cholesky", "masked_fill",
    "nn.functional.conv1d", "nn.functional.cross_entropy", "nn.functional.ctc_loss", "nn.functional.dropout",
    "nn.functional.gaussian_nll_loss", "nn.functional.layer_norm", "nn.functional.one_hot", "scatter_reduce (amax)",
    "searchsorted", "topk", "var", "where",
)  # fmt: skip

REFUSED = {"nn.functional.one_hot"}  # its size depends on values


@pytest.fixture(scope="module")
def database() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    torch.set_num_threads(1)
    return {table.name_of(operation): operation for operation in op_db}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_an_operation_gives_what_its_row_says(name: str, database: dict[str, Any]) -> None:
    operation = database[name]
    recorded = table.read().get(name, {}).get(table.version_of_torch(), {})
    for dtype in (torch.float32, torch.int64):
        if not operation.supports_dtype(dtype, "cpu"):
            continue
        row = check(operation, dtype, count=2)
        before = recorded.get(str(dtype).removeprefix("torch."))
        if row is None:
            continue
        assert not row.differ, row.differ
        if before is not None:
            assert row.refused.keys() <= before.get("refused", {}).keys(), row.refused
        elif row.refused:
            assert name in REFUSED, row.refused


def test_a_wrong_lowering_is_found(database: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(self: jax.Array) -> jax.Array:
        return jnp.sin(self) * jnp.asarray(1.0001, self.dtype)

    monkeypatch.setitem(LOWERINGS, aten.sin.default, Lowering(nearly))
    row = check(database["sin"], torch.float32, count=2)
    assert row is not None
    assert row.differ
    assert not row.agree
    # and a wrong gradient under a right result
    monkeypatch.undo()
    monkeypatch.setitem(LOWERINGS, aten.cos.default, Lowering(nearly))
    row = check(database["sin"], torch.float32, count=2)
    assert row is not None
    assert row.differ


def test_the_page_is_generated_from_the_rows() -> None:
    assert page(table.read(), table.read_reached()) == table.PAGE.read_text(), "run scripts/coverage operations --write"


def test_every_difference_has_its_reason() -> None:
    found = {
        f"{name} {dtype}"
        for name, versions in table.read().items()
        for rows in versions.values()
        for dtype, row in rows.items()
        if "differ" in row
    }
    assert found == listed("operations_differences.txt", HERE).keys()
