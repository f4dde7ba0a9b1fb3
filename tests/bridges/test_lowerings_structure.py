"""Lowerings that move, pick, reduce or multiply are torch's: on OpInfo's samples by family, and at the edges written out below.

Tolerance: 2e-5 in float32 and one unit in the last place of 16-bit floats; where a long sum exceeds it, at most twice torch's own
distance from the float64 result. Integers, bools, NaN and infinity exactly; equal elements may be picked in any order.
"""

from __future__ import annotations

import pytest
import torch
from lowering_checks import agree, family_agrees, family_of, listed
from lowering_harness import Call, call

from polyaccel_bridges.lowerings import LOWERINGS

aten = torch.ops.aten
nan, inf = float("nan"), float("inf")

POINTWISE = {"activations", "casts", "elementwise", "losses", "special"}
FAMILIES = tuple(sorted({family_of(overload) for overload in LOWERINGS} - POINTWISE - {"random"}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_lowering_of_the_family_gives_what_torch_gives(family: str) -> None:
    family_agrees(family, FAMILIES)


def test_every_core_operation_is_lowered_or_its_absence_explained() -> None:
    """The committed list can only shrink: a new core operation or a lost lowering fails here."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    pairs = (name.split(".") if "." in name else (name, "default") for name in names)
    overloads = (getattr(getattr(aten, packet), overload) for packet, overload in pairs)
    core = {overload for overload in overloads if torch.Tag.core in overload.tags}
    assert {str(overload) for overload in core - LOWERINGS.keys()} == listed("unlowered_core_ops.txt").keys()


x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def test_slices_clamp_their_ends() -> None:
    bounds = [(None, None), (-2, None), (1, 100), (-100, 2), (3, 1), (5, 9), (0, 9223372036854775807)]
    agree(
        *(call(aten.slice.Tensor, x, -1, start, end) for start, end in bounds),
        call(aten.slice.Tensor, x, 2, 0, 4, 3),
        *(
            call(aten.slice_scatter.default, x, torch.full_like(x[..., start:end], -1), -1, start, end)
            for start, end in bounds
        ),
        call(aten.slice_scatter.default, x, -x[..., 0:4:3], 2, 0, 4, 3),
        call(aten.select_scatter.default, x, -x[:, -1], 1, -1),
        call(aten.slice_copy.Tensor, x, 1, 1, 3),
        call(aten.select_copy.int, x, 1, -2),
    )


def test_views_of_empty_and_0d_tensors() -> None:
    empty, scalar = torch.zeros(0, 3), torch.tensor(2.5)
    agree(
        call(aten.view.default, empty, [3, -1]),
        call(aten.view.default, empty, [0, 5, 2]),
        call(aten.view.default, scalar, [1, 1]),
        call(aten.permute.default, x, [-1, 0, 1]),
        call(aten.expand.default, scalar, [2, 3]),
        call(aten.expand.default, torch.ones(3, 1), [2, -1, 4]),
        call(aten.squeeze.dims, torch.ones(1, 2, 1), [0, 1, -1]),
        call(aten.squeeze_copy.dims, torch.ones(1, 2, 1), [-1]),
        call(aten.unsqueeze.default, scalar, -1),
        call(aten.cat.default, [torch.zeros(0), x, x.double()], -1),  # an empty 1-d tensor always fits
        call(aten.split_with_sizes.default, x, [1, 0, 2], 1),
        call(aten.split_copy.Tensor, x, 3, 2),
        call(aten.flip.default, scalar, []),
        call(aten.roll.default, x, [1, -5], [0, -1]),
        call(aten.repeat.default, x, [2, 1, 1, 2]),
        call(aten.repeat.default, x, [0, 1, 2]),
        call(aten.diagonal.default, x, 1, -1, 0),
        call(aten.diagonal.default, x, 7),
        call(aten.as_strided.default, x, [3, 2], [1, 5], 2),
        call(aten.tril.default, x, -1),
        call(aten.triu.default, torch.ones(2, 5), 2),
        call(aten._reshape_alias.default, x, [6, 4], [4, 1]),
        call(aten._reshape_alias_copy.default, x, [6, 4], [4, 1]),
        call(aten._reshape_copy.default, x, [6, 4]),
    )


def test_padding_can_be_negative() -> None:
    volume = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(1, 2, 3, 4, 5)
    padding = [1, 2, 2, 1, 0, 1]
    agree(
        call(aten.constant_pad_nd.default, x, [-1, 2, 1, -1], 7.5),
        call(aten.constant_pad_nd.default, torch.ones(2, 2, dtype=torch.bool), [1, 1], 0),
        call(aten.reflection_pad1d.default, x, [2, 3]),
        call(aten.replication_pad1d.default, x, [-1, 3]),
        call(aten.reflection_pad3d.default, volume, padding),
        call(aten.replication_pad3d.default, volume, padding),
        call(aten.reflection_pad3d_backward.default, torch.rand(1, 2, 4, 7, 8), volume, padding),
        call(aten.replication_pad3d_backward.default, torch.rand(1, 2, 4, 7, 8), volume, padding),
    )


def test_reductions_accumulate_wide_and_promote_integers() -> None:
    many = torch.full((4096,), 1.001, dtype=torch.bfloat16)
    bools, bytes_ = torch.tensor([[True, False], [True, True]]), torch.tensor([[200, 100]], dtype=torch.uint8)
    agree(
        call(aten.sum.dim_IntList, many, None),
        call(aten.sum.dim_IntList, bools, [0]),
        call(aten.sum.dim_IntList, bytes_, [-1], True),
        call(aten.sum.dim_IntList, bools, [0], dtype=torch.float32),
        call(aten.sum.dim_IntList, x, []),
        call(aten.prod.dim_int, bytes_, 1),
        call(aten.mean.dim, many, [0]),
        call(aten.mean.default, torch.zeros(0)),
        call(aten.any.dim, bytes_, 0),
        call(aten.all.default, torch.zeros(0, dtype=torch.bool)),
        call(aten.var.correction, x, [0, 2], correction=2, keepdim=True),
        call(aten.var.correction, torch.ones(1)),  # no degree of freedom: NaN
        call(aten.var.dim, x, [1], False),
        call(aten.var_mean.correction, many, [0]),
        call(aten.norm.Scalar, x, 3),
        call(aten.linalg_vector_norm.default, x, inf, [0]),
        call(aten.linalg_vector_norm.default, x, 0),
        call(aten.logsumexp.default, torch.tensor([[-inf, -inf], [0.0, -inf], [inf, 1.0]]), [1]),
    )


def test_extremes_follow_nan() -> None:
    values = torch.tensor([[1.0, nan, 3.0, nan], [2.0, 2.0, 1.0, 0.0], [-inf, inf, inf, 0.0]])
    agree(
        *(call(op, values, [1]) for op in (aten.amax.default, aten.amin.default)),
        *(call(op, values, 1) for op in (aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim)),
        *(call(op, values, 1) for op in (aten.cummax.default, aten.cummin.default)),
        *(call(op, values) for op in (aten.argmax.default, aten.median.default, aten.nanmedian.default)),
        *(call(op, values, 1) for op in (aten.median.dim, aten.nanmedian.dim)),
        call(aten.sort.default, values, 1),
        call(aten.sort.stable, values, stable=True, dim=1, descending=True),
        call(aten.topk.default, values, 2),
        call(aten.topk.default, values, 2, 0, False),
        call(aten.topk.default, torch.tensor([3, -1, 3, 7]), 3),
        call(aten.amax.default, torch.tensor([False, True, True])),
        call(aten._softmax.default, torch.tensor([[-inf, -inf], [-inf, 0.0], [inf, 0.0]]), 1, False),
        call(aten._log_softmax.default, torch.tensor([[-inf, 0.0], [1000.0, 0.0]]), 1, False),
        call(aten.logcumsumexp.default, torch.tensor([-inf, 0.0, 1.0, -inf]), 0),
    )


def test_negative_indices_count_from_the_end_only_where_torch_says() -> None:
    rows = torch.tensor([[0, -1], [1, 0]])
    agree(
        call(aten.index.Tensor, x, [None, rows]),
        call(aten.index.Tensor, x, [rows, None, rows]),  # separated by a slice: the indexed dims come first
        call(aten.index.Tensor, x, [torch.tensor(1), torch.tensor([0, 2])]),
        call(aten.index_put.default, x, [rows], torch.tensor(-1.0)),
        call(aten.index_put.default, x, [rows], torch.ones(2, 2, 3, 4), True),
        call(aten._unsafe_index_put.default, x, [None, rows], torch.zeros(2, 2, 2, 4)),
        call(aten.take.default, x, rows),
        call(aten.put.default, x, torch.tensor([3, -1, 3]), torch.ones(3), True),
    )


def test_a_boolean_mask_writes_without_a_shape_that_depends_on_values() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    agree(
        call(aten.index_put.default, x, [mask], torch.tensor(-1.0)),
        call(aten.index_put.default, x, [mask], torch.arange(4.0)),
        call(aten.index_put.default, x, [mask], torch.arange(12.0).reshape(3, 4)),  # one row per true element
        call(aten.index_put.default, x, [mask], torch.ones(1, 4), True),
        call(aten.index_put.default, x, [None, torch.tensor([True, False, True])], torch.arange(8.0).reshape(2, 4)),
        call(aten.index_put.default, x, [None, torch.tensor([True, False, True])], torch.arange(16.0).reshape(2, 2, 4)),
        call(aten.masked_scatter.default, x, mask[..., None], torch.arange(100.0)),
    )


def test_scatters_of_one_element_per_line_and_of_many_agree() -> None:
    zeros, classes = torch.zeros(3, 5), torch.tensor([[4], [0], [2]])
    several = torch.tensor([[4, 4, 1], [0, 0, 0]])
    agree(
        call(aten.scatter.value, zeros, 1, classes, -1.5),  # the backward of cross entropy
        call(aten.scatter.src, zeros, 1, classes, torch.rand(3, 2)),
        call(aten.scatter_add.default, zeros.to(torch.int32), 1, classes, torch.ones(3, 1, dtype=torch.int32)),
        call(aten.scatter_add.default, zeros, 1, several, torch.rand(2, 3)),
        call(aten.scatter_add.default, zeros.bool(), 1, several, torch.ones(2, 3, dtype=torch.bool)),
        call(aten.scatter.value_reduce, zeros + 3, 1, several[:, :1], 2.0, reduce="multiply"),
        *(
            call(aten.scatter_reduce.two, zeros + 2, -1, several, torch.rand(2, 3), kind, include_self=included)
            for kind in ("sum", "prod", "mean", "amax", "amin")
            for included in (True, False)
        ),
        call(
            aten.scatter_reduce.two,
            torch.ones(4, dtype=torch.int64),
            0,
            several[0] - 1,
            torch.tensor([5, 6, -9]),
            "mean",
        ),
        call(aten.gather.default, torch.rand(3, 5), 1, several),
        call(aten.gather.default, torch.tensor(1.5), 0, torch.tensor([0, 0])),
        call(aten.scatter.value, torch.tensor(1.0), 0, torch.tensor(0), 3.0),
    )


def test_searches_take_either_side() -> None:
    edges = torch.tensor([1.0, 3.0, 3.0, 5.0])
    agree(
        call(aten.searchsorted.Tensor, edges, torch.tensor([[0.0, 3.0], [nan, 9.0]]), right=True),
        call(aten.searchsorted.Tensor, edges, torch.tensor([3, 4]), out_int32=True, side="left"),
        call(aten.searchsorted.Scalar, edges, 3.0),
        call(aten.bucketize.Tensor, torch.tensor([3, 4]), edges, right=True),
        call(aten.bucketize.Scalar, 3.0, edges, right=True),
    )


def test_ranges_are_exact_at_their_ends() -> None:
    agree(
        call(aten.arange.start_step, 0, 10, 3),
        call(aten.arange.start_step, 5, -5, -3),
        call(aten.arange.start_step, 0, 1, 0.1),
        call(aten.arange.start_step, 0, 3, 1, dtype=torch.float32),
        call(aten.arange.start_step, 2**53, 2**53 + 3),
        call(aten.linspace.default, 0, 10, 7),
        call(aten.linspace.default, -1, 1, 4, dtype=torch.int64),
        call(aten.linspace.default, 3.0, 9.0, 1),
        call(aten.scalar_tensor.default, 3),
        call(aten.full.default, [2], True),
        call(aten.full.default, [2], -1, dtype=torch.uint8),
        call(aten.tril_indices.default, 3, 4, 1),
        call(aten.eye.m, 2, 3, dtype=torch.int64),
    )


def test_batch_normalization_returns_its_running_statistics() -> None:
    batch, ones = torch.rand(4, 3, 5), torch.ones(3)
    agree(call(aten._native_batch_norm_legit_functional.default, batch, ones, ones, ones, ones, True, 0.1, 1e-5))
    agree(call(aten._native_batch_norm_legit_functional.default, batch, ones, ones, ones, ones, False, 0.1, 1e-5))


def test_products_of_narrow_matrices_can_be_wide() -> None:
    """`aten.mm.dtype` and `aten.bmm.dtype` have no CPU kernel: the float32 product of the same numbers is the reference."""
    a, b = torch.rand(2, 3, 4).bfloat16(), torch.rand(2, 4, 5).bfloat16()
    wide = a.float() @ b.float()
    agree(
        Call("by hand", aten.bmm.dtype, (a, b, torch.float32), {}, wide),
        Call("by hand", aten.mm.dtype, (a[0], b[0], torch.float32), {}, wide[0]),
    )


def test_embeddings_outside_of_training() -> None:
    table, rows = torch.arange(12.0).reshape(4, 3), torch.tensor([1, 3, 3])
    agree(
        call(aten.embedding_renorm.default, table, rows, 5.0, 2.0),
        call(aten._embedding_bag_forward_only.default, table, rows, torch.tensor([0, 2]), False, 1),
    )


def test_antialiased_bicubic_resampling() -> None:
    image = torch.rand(1, 2, 6, 8)
    agree(
        call(aten._upsample_bicubic2d_aa.default, image, [3, 5], False),
        call(aten._upsample_bicubic2d_aa_backward.default, torch.rand(1, 2, 3, 5), [3, 5], [1, 2, 6, 8], False),
    )


def test_what_has_no_meaning_without_storage_is_refused_with_its_reason() -> None:
    refuses = LOWERINGS[aten.as_strided.default].refuses
    assert refuses is not None
    assert refuses(x, [2], [1]) is None
    assert "contiguous" in str(refuses(x.mT, [2], [1]))
    assert "contiguous" in str(refuses(x[1], [2], [1]))
    of_index = LOWERINGS[aten.index.Tensor].refuses
    assert of_index is not None
    assert "mask" in str(of_index(x, [torch.tensor([True, False])]))
    of_index_put = LOWERINGS[aten.index_put.default].refuses
    assert of_index_put is not None
    assert of_index_put(x, [torch.tensor([True, False])], x) is None
    assert "mask" in str(of_index_put(x, [torch.tensor([True, False]), torch.tensor([0])], x))
