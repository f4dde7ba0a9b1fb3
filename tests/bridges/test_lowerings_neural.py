"""Every neural-network lowering against PyTorch: outputs, their dtypes, and the gradients of every floating input and parameter.

A family is captured as one program, so that the compiler runs once; a failure names the case. Tolerance: 2e-5 of the largest value,
float32 sums in another order. The dtype and shape of every intermediate result are checked by the replay itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from captured_parity import arrays_of, error, specs_of, state_arrays, train_both
from torch import nn
from torch.utils._pytree import tree_leaves

from polyaccel_bridges.capture import capture_forward, capture_training
from polyaccel_bridges.replay import exact_dtypes, run_forward

CLOSE = 2e-5


class Case(nn.Module):
    """A function or module with its inputs as parameters (floating, so that they get gradients) and buffers (the others)."""

    def __init__(self, function: Callable[..., Any], *inputs: torch.Tensor):
        super().__init__()
        self.function = function
        self.names = []
        for index, tensor in enumerate(inputs):
            if tensor.is_floating_point():
                self.register_parameter(f"input{index}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"input{index}", tensor)
            self.names.append(f"input{index}")

    def forward(self) -> list[torch.Tensor]:
        out = self.function(*(getattr(self, name) for name in self.names))
        return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def weighted(out: torch.Tensor) -> torch.Tensor:
    """A sum in which every element counts differently, so that a wrong gradient cannot hide."""
    return (out.float() * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).cos()).sum()


def check(cases: dict[str, Case], tolerance: float = CLOSE) -> None:
    owners: list[str] = []

    def step(modules: Any) -> Any:
        total, aux = torch.zeros(()), []
        owners.clear()
        for name in cases:
            outputs = modules[name]()
            aux += outputs
            owners.extend([name] * len(outputs))
            total = total + sum(weighted(out) for out in outputs if out.requires_grad)
        return total, aux

    parity = train_both(step, cases, [])
    wrong = {name: e for name, e in {**parity.grad_errors, **parity.buffer_errors}.items() if not e < tolerance}
    wrong |= {f"{name} output": e for name, e in zip(owners, parity.aux_errors, strict=True) if not e < tolerance}
    assert wrong == {}


def floats(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape) * scale


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions():
    check(
        {
            "conv1d": Case(nn.Conv1d(4, 6, 3, stride=2, padding=1), floats(2, 4, 9)),
            "conv2d": Case(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), floats(2, 3, 8, 7)),
            "conv3d": Case(nn.Conv3d(2, 3, 2, padding=1), floats(2, 2, 4, 5, 3)),
            "grouped": Case(nn.Conv2d(4, 8, 3, groups=2, bias=False), floats(2, 4, 6, 6)),
            "depthwise": Case(nn.Conv2d(4, 4, 3, groups=4, padding="same"), floats(2, 4, 6, 6)),
            "same_even": Case(nn.Conv1d(2, 3, 4, padding="same"), floats(2, 2, 7)),
            "unbatched": Case(nn.Conv2d(3, 4, 3), floats(3, 6, 6)),
            "reflect": Case(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), floats(1, 2, 5, 5)),
            "transposed1d": Case(nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), floats(2, 4, 5)),
            "transposed2d": Case(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), floats(2, 4, 5, 4)),
            "transposed3d": Case(nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), floats(1, 2, 3, 3, 2)),
            "narrow_transposed": Case(nn.ConvTranspose2d(2, 3, 2, padding=2, stride=3), floats(1, 2, 4, 4)),
        }
    )


def test_sliding_pools():
    images = floats(2, 3, 9, 8)
    ties = torch.randint(
        0, 3, (2, 3, 8, 8)
    ).float()  # equal elements in nearly every window: the first one gets the gradient
    check(
        {
            "max1d": Case(nn.MaxPool1d(3, 2, 1), floats(2, 3, 9)),
            "max2d": Case(nn.MaxPool2d(2), images),
            "max2d_overlapping": Case(nn.MaxPool2d(3, 2, 1, return_indices=True), images),
            "max2d_ties": Case(nn.MaxPool2d(3, 2, 1, return_indices=True), ties),
            "max2d_ceil_dilated": Case(
                nn.MaxPool2d((3, 2), 2, 1, dilation=(2, 1), ceil_mode=True, return_indices=True), images
            ),
            "max3d": Case(nn.MaxPool3d(2, 2, return_indices=True), floats(1, 2, 5, 4, 6)),
            "unpooled": Case(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), floats(1, 2, 6, 6)),
            "avg1d": Case(nn.AvgPool1d(3, 2, 1), floats(2, 3, 9)),
            "avg2d": Case(nn.AvgPool2d(3, 2, 1), images),
            "avg2d_ceil": Case(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), images),
            "avg2d_divisor": Case(nn.AvgPool2d((2, 3), 2, divisor_override=5), images),
            "avg3d": Case(nn.AvgPool3d(2, 2, 1, count_include_pad=False), floats(1, 2, 5, 4, 6)),
            "power": Case(nn.LPPool2d(2, 3, 2), images),
        }
    )


def test_windows_of_many_elements_are_gathered_instead_of_walked():
    x = floats(1, 2, 40, 36)
    ties = torch.randint(0, 9, (1, 2, 40, 36)).float()
    check(
        {
            "max_global": Case(nn.AdaptiveMaxPool2d(1, return_indices=True), x),
            "max_ties": Case(nn.MaxPool2d(17, 1, 8, return_indices=True), ties),
            "max_tiles": Case(nn.MaxPool2d((20, 18), return_indices=True), x),
            "max_adaptive": Case(nn.AdaptiveMaxPool2d((2, 1), return_indices=True), floats(1, 2, 41, 35)),
            "avg_sliding": Case(nn.AvgPool2d(19, 3, 9), x),
            "avg_tiles": Case(nn.AvgPool2d((20, 18)), x),
            "avg_adaptive": Case(nn.AdaptiveAvgPool2d((2, 1)), floats(1, 2, 41, 35)),
        }
    )


def test_a_window_of_minus_infinity_keeps_a_place_inside_the_image():
    x = torch.full((1, 1, 4, 4), -torch.inf)
    graph = capture_forward(
        lambda x: list(F.max_pool2d(x, 3, 2, 1, return_indices=True)), {}, specs_of([x]), autocast=None
    )
    with exact_dtypes():
        (_, indices), _ = run_forward(graph, {}, {}, arrays_of([x]), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(indices), F.max_pool2d(x, 3, 2, 1, return_indices=True)[1].numpy())


def test_adaptive_pools():
    cases: dict[str, Case] = {}
    for dims, sizes in ((1, (1, 3)), (2, (1, 3, 4)), (3, (3,))):
        for size in sizes:  # 7 is no multiple of 3 or 4: windows of different lengths
            x = floats(2, 2, *[7] * dims)
            cases[f"avg{dims}_{size}"] = Case(getattr(nn, f"AdaptiveAvgPool{dims}d")(size), x)
            cases[f"max{dims}_{size}"] = Case(getattr(nn, f"AdaptiveMaxPool{dims}d")(size, return_indices=True), x)
    cases["avg_regular"] = Case(nn.AdaptiveAvgPool2d((2, 4)), floats(2, 2, 8, 8))
    cases["max_regular"] = Case(nn.AdaptiveMaxPool2d((2, 4)), floats(2, 2, 8, 8))
    check(cases)


def test_a_fractional_pool_takes_torchs_windows_for_given_samples():
    def pool(dims: int) -> Callable[..., Any]:
        function = torch.ops.aten.fractional_max_pool2d if dims == 2 else torch.ops.aten.fractional_max_pool3d
        return lambda x, samples: function(x, [2] * dims, [3] * dims, samples.detach())

    check(
        {
            "two": Case(pool(2), floats(2, 3, 7, 8), torch.rand(2, 3, 2)),
            "three": Case(pool(3), floats(2, 2, 7, 8, 7), torch.rand(2, 2, 3)),
        }
    )


def test_maximum_pools_pass_nan_on_as_torch_does():
    x = floats(1, 1, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    graph = capture_forward(
        lambda x: list(F.max_pool2d(x, 3, 1, return_indices=True)), {}, specs_of([x]), autocast=None
    )
    with exact_dtypes():
        (values, indices), _ = run_forward(graph, {}, {}, arrays_of([x]), jax.random.key(0))
    expected, where = F.max_pool2d(x, 3, 1, return_indices=True)
    np.testing.assert_array_equal(np.asarray(values), expected.numpy())
    np.testing.assert_array_equal(np.asarray(indices), where.numpy())


def test_normalizations():
    cases: dict[str, Case] = {}
    for dims in (1, 2, 3):
        x = floats(3, 4, *[3] * dims) * 3 + 1
        cases[f"batch{dims}"] = Case(getattr(nn, f"BatchNorm{dims}d")(4), x)
        cases[f"instance{dims}"] = Case(
            getattr(nn, f"InstanceNorm{dims}d")(4, affine=True, track_running_stats=True), x
        )
    cases["batch_flat"] = Case(nn.BatchNorm1d(4, momentum=0.3, eps=1e-3), floats(6, 4))
    evaluated = nn.BatchNorm2d(4).eval()
    evaluated.running_mean.normal_()
    evaluated.running_var.uniform_(0.5, 2)
    cases["batch_evaluated"] = Case(evaluated, floats(3, 4, 3, 3))
    cases["batch_without_statistics"] = Case(nn.BatchNorm2d(4, track_running_stats=False), floats(3, 4, 3, 3))
    cases["batch_plain"] = Case(nn.BatchNorm2d(4, affine=False), floats(3, 4, 3, 3))
    cases["layer"] = Case(nn.LayerNorm(5), floats(2, 3, 5))
    cases["layer_two_dims"] = Case(nn.LayerNorm((3, 5), elementwise_affine=False), floats(2, 3, 5))
    cases["layer_without_bias"] = Case(nn.LayerNorm(5, bias=False), floats(2, 3, 5))
    cases["group"] = Case(nn.GroupNorm(2, 4), floats(3, 4, 3, 2))
    cases["group_plain"] = Case(nn.GroupNorm(4, 4, affine=False), floats(3, 4, 5))
    cases["rms"] = Case(nn.RMSNorm(5), floats(2, 3, 5))
    cases["local_response"] = Case(nn.LocalResponseNorm(3), floats(2, 4, 3, 3))
    for case in cases.values():  # scales and shifts of 1 and 0 would hide a mistake
        for name, parameter in case.named_parameters():
            if name.startswith("function."):
                nn.init.uniform_(parameter, 0.5, 1.5)
    check(cases, 5e-5)  # centred sums cancel


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8)], ids=lambda layer: type(layer).__name__
)
def test_normalizing_bfloat16_keeps_32_bit_statistics(layer):
    x = (torch.randn(16, 8) * 0.1 + 40).bfloat16()  # at 40 a bfloat16 mean is up to 0.1 off: a whole standard deviation
    modules = {"layer": layer}
    graph = capture_training(
        lambda x: ((layer(x).float() ** 3).sum(), [layer(x)]), modules, specs_of([x]), autocast=None
    )
    statistics = {str(s.expected[1].dtype) for s in graph.program.instructions if "norm" in s.name}
    assert statistics == {"float32"}


def test_attention():
    q, k, v = floats(2, 4, 6, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8)
    attend = F.scaled_dot_product_attention
    allowed = torch.rand(6, 5) > 0.3
    allowed[:, 0] = True
    check(
        {
            "plain": Case(attend, q, k, v),
            "causal": Case(lambda q, k, v: attend(q, k, v, is_causal=True), q, k, v),
            "scaled": Case(lambda q, k, v: attend(q, k, v, scale=0.3), q, k, v),
            "masked": Case(lambda q, k, v, m: attend(q, k, v, m), q, k, v, allowed),
            "masked_per_key": Case(
                lambda q, k, v, m: attend(q, k, v, m), q, k, v, allowed[None, None, :1].expand(2, 1, 1, 5)
            ),
            "biased": Case(lambda q, k, v, m: attend(q, k, v, m.detach()), q, k, v, floats(2, 1, 6, 5)),
            "learned_bias": Case(attend, q, k, v, floats(6, 5)),
            "grouped": Case(
                lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True),
                q,
                floats(2, 2, 6, 8),
                floats(2, 2, 6, 8),
            ),
            "other_value_size": Case(attend, q, k, floats(2, 4, 5, 3)),
            "three_dims": Case(attend, q[0], k[0], v[0]),
            "multihead": Case(
                nn.MultiheadAttention(8, 2, batch_first=True), floats(2, 3, 8), floats(2, 4, 8), floats(2, 4, 8)
            ),
            "encoder": Case(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), floats(2, 3, 8)),
        },
        1e-4,  # the key bias of an attention layer has gradient 0: only its rounding noise is compared
    )


def test_a_row_that_may_attend_to_nothing_gives_what_torch_gives():
    q, k, v = floats(1, 2, 3, 4), floats(1, 2, 3, 4), floats(1, 2, 3, 4)
    allowed = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    check({"masked": Case(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), q, k, v, allowed)})


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_in_blocks_of_queries_equals_attention_at_once(monkeypatch, is_causal):
    from polyaccel_bridges.lowerings import attention

    monkeypatch.setattr(attention, "_MAX_BLOCK_SCORES", 16 * 32)
    q, k, v = (floats(2, 2, 64, 8) for _ in range(3))
    bias = floats(2, 1, 64, 64)
    assert attention._block_size(64, 32) == 16
    check(
        {
            "plain": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), q, k, v),
            "biased": Case(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.detach()), q, k, v, bias),
            "per_key": Case(
                lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.detach()), q, k, v, bias[:, :, :1]
            ),
        }
    )


def test_attention_with_dropout_drops_weights_and_keeps_their_mean():
    # Equal keys: every weight is 1/256, so with p = 0.25 the output is the mean of kept ones / 0.75.
    q, k, v = torch.zeros(1, 4, 64, 8), torch.zeros(1, 4, 256, 8), torch.ones(1, 4, 256, 8)
    graph = capture_forward(
        lambda *qkv: [F.scaled_dot_product_attention(*qkv, dropout_p=0.25)], {}, specs_of([q, k, v]), autocast=None
    )
    with exact_dtypes():
        (out,), _ = run_forward(graph, {}, {}, arrays_of([q, k, v]), jax.random.key(0))
    assert abs(float(out.mean()) - 1) < 0.01  # 65536 draws: five standard deviations
    assert 0.02 < float(out[..., 0].std()) < 0.06  # sqrt(0.25 / 0.75 / 256) = 0.036


def test_embeddings():
    ids = torch.tensor([[1, 2, 2], [0, 5, 1]])
    offsets = torch.tensor([0, 2, 2])
    table = floats(8, 4)
    cases = {
        "plain": Case(nn.Embedding(8, 4), ids),
        "padding": Case(nn.Embedding(8, 4, padding_idx=2), ids),
        "by_frequency": Case(nn.Embedding(8, 4, scale_grad_by_freq=True), ids),
        "int32": Case(nn.Embedding(8, 4), ids.int()),
        "weighted_bag": Case(
            lambda w, i, o, p: F.embedding_bag(i, w, o, mode="sum", per_sample_weights=p),
            table,
            ids.flatten(),
            offsets,
            floats(6),
        ),
        "last_offset": Case(
            lambda w, i, o: F.embedding_bag(i, w, o, include_last_offset=True),
            table,
            ids.flatten(),
            torch.tensor([0, 2, 6]),
        ),
    }
    for mode in ("sum", "mean", "max"):
        cases[f"bag_{mode}"] = Case(nn.EmbeddingBag(8, 4, mode=mode), ids)
        cases[f"bag_{mode}_padding"] = Case(nn.EmbeddingBag(8, 4, mode=mode, padding_idx=2), ids.flatten(), offsets)
    check(cases)


def test_an_embedding_with_maximum_norm_shortens_the_rows_it_reads():
    model = nn.Embedding(8, 4, max_norm=1.0)
    ids = torch.tensor([1, 2, 2])
    graph = capture_forward(lambda i: [model(i)], {"model": model}, specs_of([ids]), autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        (out,), written = run_forward(graph, params, buffers, arrays_of([ids]), jax.random.key(0))
    with torch.no_grad():
        expected = model(ids)
    assert error(out, expected) < CLOSE
    assert error(written["model.weight"], model.weight) < CLOSE


def test_matrix_products():
    a, b = floats(2, 3, 4), floats(2, 4, 5)
    check(
        {
            "mm": Case(torch.mm, a[0], b[0]),
            "bmm": Case(torch.bmm, a, b),
            "broadcast": Case(torch.matmul, floats(5, 1, 3, 4), b),
            "mv": Case(torch.mv, a[0], floats(4)),
            "dot": Case(torch.dot, floats(4), floats(4)),
            "vdot": Case(torch.vdot, floats(4), floats(4)),
            "addmm": Case(lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), floats(3, 5), a[0], b[0]),
            "addmm_ignored": Case(
                lambda c, a, b: torch.addmm(c.detach() * torch.inf, a, b, beta=0), floats(5), a[0], b[0]
            ),
            "addmv": Case(torch.addmv, floats(3), a[0], floats(4)),
            "baddbmm": Case(lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2), floats(2, 3, 5), a, b),
            "addbmm": Case(lambda c, a, b: torch.addbmm(c, a, b, beta=0.5, alpha=2), floats(3, 5), a, b),
            "addr": Case(lambda c, a, b: torch.addr(c, a, b, beta=0.5, alpha=2), floats(3, 5), floats(3), floats(5)),
            "integers": Case(torch.mm, torch.randint(-9, 9, (3, 4)), torch.randint(-9, 9, (4, 2))),
            "einsum": Case(lambda a, b: torch.einsum("bij,bjk->kbi", a, b), a, b),
            "bilinear": Case(nn.Bilinear(3, 4, 5), floats(2, 3), floats(2, 4)),
        }
    )


def test_32_bit_products_ask_for_32_bit_products_on_every_accelerator():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(4, 5))
    x = floats(2, 2, 4)
    graph = capture_training(lambda x: (model(x).sum(), []), {"model": model}, specs_of([x]), autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    from polyaccel_bridges.replay import run_training

    with exact_dtypes():
        text = str(
            jax.make_jaxpr(lambda *a: run_training(graph, *a).grads)(params, buffers, arrays_of([x]), jax.random.key(0))
        )
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products >= 5
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count("precision=HIGHEST") == products


def test_distances():
    x, y = floats(5, 3), floats(4, 3)
    cases = {
        f"cdist_{p}": Case(lambda x, y, p=p: torch.cdist(x, y, p=p), x, y)
        for p in (0.0, 1.0, 1.5, 2.0, 3.0, float("inf"))
    }
    cases |= {f"pdist_{p}": Case(lambda x, p=p: F.pdist(x, p), x) for p in (1.0, 1.5, 2.0, 3.0, float("inf"))}
    same = torch.ones(2, 3)
    cases["equal_points"] = Case(lambda x, y: torch.cdist(x, y), same, same.clone())
    cases["many_points"] = Case(torch.cdist, floats(30, 3), floats(28, 3))
    cases["batched"] = Case(torch.cdist, floats(2, 5, 3), floats(2, 4, 3))
    check(cases)


def test_resizing():
    x = floats(2, 3, 5, 7)
    cases: dict[str, Case] = {}
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        for size in ((9, 4), (3, 14)):
            cases[f"{mode}_{size}"] = Case(lambda x, mode=mode, size=size: F.interpolate(x, size=size, mode=mode), x)
    for mode in ("bilinear", "bicubic"):
        cases[f"{mode}_corners"] = Case(lambda x, mode=mode: F.interpolate(x, (9, 4), mode=mode, align_corners=True), x)
        cases[f"{mode}_antialiased"] = Case(lambda x, mode=mode: F.interpolate(x, (3, 9), mode=mode, antialias=True), x)
        cases[f"{mode}_antialiased_factor"] = Case(
            lambda x, mode=mode: F.interpolate(x, scale_factor=(0.4, 0.7), mode=mode, antialias=True), x
        )
    cases["linear"] = Case(lambda x: F.interpolate(x, 9, mode="linear"), floats(2, 3, 5))
    cases["trilinear"] = Case(lambda x: F.interpolate(x, scale_factor=1.5, mode="trilinear"), floats(1, 2, 3, 4, 5))
    check(cases)


def test_grid_sampling():
    x, grid = floats(2, 3, 5, 6), torch.rand(2, 4, 3, 2) * 3 - 1.5
    cases: dict[str, Case] = {}
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            for corners in (False, True) if mode == "bilinear" else (padding == "border",):
                cases[f"{mode}_{padding}_{corners}"] = Case(
                    lambda x, g, m=mode, p=padding, c=corners: F.grid_sample(x, g, m, p, c), x, grid
                )
    cases["volume"] = Case(
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        floats(1, 2, 3, 4, 5),
        torch.rand(1, 2, 3, 2, 3) * 3 - 1.5,
    )
    cases["identity"] = Case(
        lambda x, t: F.grid_sample(
            x, F.affine_grid(t, (1, 2, 4, 4), align_corners=True), padding_mode="border", align_corners=True
        ),
        floats(1, 2, 4, 4),
        torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]),
    )
    check(cases, 5e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers():
    check(
        {
            "lstm": Case(nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), floats(2, 3, 4)),
            "projected": Case(nn.LSTM(4, 5, proj_size=3), floats(3, 2, 4)),
            "gru": Case(nn.GRU(4, 5), floats(3, 2, 4)),
            "rnn": Case(nn.RNN(4, 5, nonlinearity="relu"), floats(3, 2, 4)),
            "lstm_cell": Case(nn.LSTMCell(4, 5), floats(2, 4)),
            "gru_cell": Case(nn.GRUCell(4, 5), floats(2, 4)),
        }
    )


# --- random draws ----------------------------------------------------------------------------------------------------------------

COUNT = 20_000


def draws() -> dict[str, Callable[[], torch.Tensor]]:
    ramp = torch.linspace(0.2, 0.9, COUNT)
    return {
        "rand": lambda: torch.rand(COUNT),
        "randn": lambda: torch.randn(COUNT),
        "rand_like": lambda: torch.rand_like(torch.empty(COUNT)),
        "randn_like": lambda: torch.randn_like(torch.empty(COUNT)),
        "rand_bfloat16": lambda: torch.rand(COUNT, dtype=torch.bfloat16),
        "randn_float64": lambda: torch.randn(COUNT, dtype=torch.float64),
        "randint": lambda: torch.randint(-3, 12, (COUNT,)),
        "randint_int32": lambda: torch.randint(7, (COUNT,), dtype=torch.int32),
        "randint_like": lambda: torch.randint_like(torch.empty(COUNT), 2, 9),
        "random_to": lambda: torch.empty(COUNT).random_(9),
        "random_from": lambda: torch.empty(COUNT, dtype=torch.int64).random_(-5, 9),
        "random_uint8": lambda: torch.empty(COUNT, dtype=torch.uint8).random_(),
        "normal": lambda: torch.normal(ramp, 0.5),
        "normal_scale": lambda: torch.normal(1.0, ramp),
        "normal_both": lambda: torch.normal(ramp, ramp),
        "normal_in_place": lambda: torch.empty(COUNT).normal_(2, 3),
        "normal_size": lambda: torch.normal(2.0, 3.0, (COUNT,)),
        "uniform": lambda: torch.empty(COUNT).uniform_(-2, 5),
        "exponential": lambda: torch.empty(COUNT).exponential_(2.0),
        "cauchy": lambda: torch.empty(COUNT).cauchy_(1, 2),
        "log_normal": lambda: torch.empty(COUNT).log_normal_(0.1, 0.5),
        "geometric": lambda: torch.empty(COUNT).geometric_(0.3),
        "bernoulli": lambda: torch.bernoulli(ramp),
        "bernoulli_p": lambda: torch.empty(COUNT).bernoulli_(0.3),
        "poisson": lambda: torch.poisson(ramp * 5),
        "binomial": lambda: torch.binomial(torch.full((COUNT,), 10.0), ramp),
        "gamma": lambda: torch._standard_gamma(ramp * 3),
        "multinomial": lambda: torch.multinomial(torch.tensor([0.1, 0.0, 3.0, 1.0]), COUNT, replacement=True),
        "dropout": lambda: F.dropout(torch.ones(COUNT), 0.3),
        "alpha_dropout": lambda: F.alpha_dropout(torch.ones(COUNT), 0.3),
        "rrelu": lambda: F.rrelu(-torch.ones(COUNT), training=True),
        "gumbel": lambda: F.gumbel_softmax(torch.zeros(COUNT, 2), hard=False)[:, 0],
    }


def test_random_draws_have_torchs_distributions():
    # Kolmogorov-Smirnov on 20,000 draws each; p > 1e-4 for all 32 (with fixed keys the outcome is fixed).
    functions = draws()
    graph = capture_forward(lambda: [draw() for draw in functions.values()], {}, [], autocast=None)
    with exact_dtypes():
        outputs, _ = jax.jit(lambda key: run_forward(graph, {}, {}, [], key))(jax.random.key(7))
    wrong = {}
    for (name, draw), got in zip(functions.items(), outputs, strict=True):
        expected = draw()
        assert str(got.dtype) == str(expected.dtype).removeprefix("torch.")
        value = scipy.stats.ks_2samp(np.asarray(got, np.float64), expected.double().numpy()).pvalue
        if value < 1e-4:
            wrong[name] = value
    assert wrong == {}


def test_draws_stay_in_their_ranges():
    functions = [
        lambda: torch.rand(COUNT, dtype=torch.bfloat16),
        lambda: torch.empty(COUNT).exponential_(),
        lambda: torch.randperm(COUNT),
        lambda: torch.multinomial(torch.rand(50, 20) + 0.01, 20),
    ]
    graph = capture_forward(lambda: [f() for f in functions], {}, [], autocast=None)
    with exact_dtypes():
        (uniform, exponential, permutation, chosen), _ = run_forward(graph, {}, {}, [], jax.random.key(0))
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(exponential.min()) > 0
    assert sorted(permutation.tolist()) == list(range(COUNT))
    assert permutation.tolist() != list(range(COUNT))
    assert all(sorted(row) == list(range(20)) for row in chosen.tolist())


def test_without_replacement_heavier_choices_come_first_more_often():
    weights = torch.tensor([1.0, 2.0, 5.0]).expand(4000, 3)
    graph = capture_forward(lambda w: [torch.multinomial(w, 2)], {}, specs_of([weights]), autocast=None)
    with exact_dtypes():
        (chosen,), _ = run_forward(graph, {}, {}, arrays_of([weights]), jax.random.key(0))
    shares = np.bincount(np.asarray(chosen)[:, 0], minlength=3) / 4000
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.03)  # four standard deviations


def test_samples_of_a_gamma_carry_torchs_gradient():
    concentration = torch.tensor([0.5, 1.5, 4.0])
    samples = torch.tensor([0.3, 1.0, 5.0])
    expected = torch.ops.aten._standard_gamma_grad(concentration, samples)
    graph = capture_forward(
        lambda a, b: [torch.ops.aten._standard_gamma_grad(a, b)], {}, specs_of([concentration, samples]), autocast=None
    )
    with exact_dtypes():
        (got,), _ = run_forward(graph, {}, {}, arrays_of([concentration, samples]), jax.random.key(0))
    assert error(got, expected) < 1e-3  # two different approximations
