"""What the capture promises: one step of any torch module, replayed by jax, gives torch's loss, gradients and buffers.

Tolerances: 1e-5 of the largest value for float32 (other orders of summation in a few hundred operations), unless a test says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured_parity import arrays_of, specs_of, state_arrays, train_both
from torch import nn
from torch.utils.checkpoint import checkpoint

from polyaccel.errors import PolyaccelError, PrepareError, UnsupportedError
from polyaccel_bridges.capture import capture_forward, capture_training, capture_vjp
from polyaccel_bridges.graphs import TensorSpec
from polyaccel_bridges.lowerings import LOWERINGS, Lowering
from polyaccel_bridges.replay import exact_dtypes, run_forward, run_training

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Convolutional(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(128, 10)

    def forward(self, x):  # (batch, 1, 8, 8)
        return self.head(self.dropout(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)))


def images(count: int = 8) -> list[torch.Tensor]:
    return [torch.randn(count, 1, 8, 8), torch.randint(0, 10, (count,))]


def classification(modules, x, y):
    return F.cross_entropy(modules["model"](x), y)


def squares(modules, *inputs):
    return (modules["model"](*inputs) ** 2).mean()


# --- one training step -------------------------------------------------------------------------------------------------------


def test_a_convolutional_network_with_batch_norm_trains_as_in_torch_and_updates_its_statistics():
    parity = train_both(classification, {"model": Convolutional()}, images())
    assert parity.worst < CLOSE
    assert set(parity.result.new_buffers) == {
        "model.norm.running_mean",
        "model.norm.running_var",
        "model.norm.num_batches_tracked",
    }
    assert parity.result.new_buffers["model.norm.num_batches_tracked"].dtype == np.int64
    assert int(parity.result.new_buffers["model.norm.num_batches_tracked"]) == 1


def test_capturing_changes_nothing_in_the_modules():
    model, specs = Convolutional(), specs_of(images())
    before = {name: (id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    attributes = {id(m): dict(m.__dict__) for m in model.modules()}
    state = torch.get_rng_state()
    capture_training(lambda x, y: (classification({"model": model}, x, y), []), {"model": model}, specs, autocast=None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.grad is None
    assert all(m.__dict__ == attributes[id(m)] for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.compiler.is_compiling()


def test_the_modules_are_restored_when_the_function_raises():
    model = Convolutional()
    weight = model.conv.weight
    with pytest.raises(ZeroDivisionError) as caught:
        capture_training(lambda x: (model(x) / (1 // 0), []), {"model": model}, specs_of(images()[:1]), autocast=None)
    assert model.conv.weight is weight
    assert "while the model was captured" in caught.value.__notes__[0]


def test_capture_reads_shapes_only_so_meta_parameters_do():
    with torch.device("meta"):
        model = Convolutional()
    graph = capture_training(
        lambda x, y: (classification({"model": model}, x, y), []), {"model": model}, specs_of(images()), autocast=None
    )
    assert "model.conv.weight" in graph.grad_names
    assert model.conv.weight.is_meta


def test_tied_parameters_have_one_name_and_one_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    parity = train_both(squares, {"model": Tied()}, [torch.randint(0, 20, (4, 5))])
    assert parity.graph.state_names == (("model.table.weight", True),)
    assert parity.graph.tied == {"model.head.weight": "model.table.weight"}
    assert parity.worst < CLOSE


def test_one_module_under_two_keys_is_one_module():
    model = nn.Linear(3, 3)
    parity = train_both(lambda m, x: (m["a"](m["b"](x)) ** 2).mean(), {"a": model, "b": model}, [torch.randn(2, 3)])
    assert parity.graph.grad_names == ("a.weight", "a.bias")


def test_two_modules_are_captured_together():
    modules = {"generator": nn.Linear(4, 6), "critic": nn.Sequential(nn.Linear(6, 3), nn.Tanh())}
    parity = train_both(lambda m, x: m["critic"](m["generator"](x)).square().mean(), modules, [torch.randn(5, 4)])
    assert parity.worst < CLOSE
    assert {name.partition(".")[0] for name in parity.graph.grad_names} == {"generator", "critic"}


def test_frozen_parameters_come_in_as_parameters_and_get_no_gradient():
    model = Convolutional()
    model.conv.requires_grad_(False)
    parity = train_both(classification, {"model": model}, images())
    assert ("model.conv.weight", True) in parity.graph.state_names
    assert "model.conv.weight" not in parity.result.grads
    assert parity.worst < CLOSE


def test_a_parameter_that_the_loss_does_not_reach_has_no_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    parity = train_both(squares, {"model": Half()}, [torch.randn(4, 3)])
    assert parity.graph.grad_names == ("model.used.weight", "model.used.bias")


def test_auxiliary_values_come_out_detached():
    def step(modules, x, y):
        logits = modules["model"](x)
        return F.cross_entropy(logits, y), [logits, logits.argmax(-1) == y]

    parity = train_both(step, {"model": Convolutional()}, images())
    assert parity.worst < CLOSE
    assert [(spec.shape, str(spec.dtype)) for spec in parity.graph.output_specs] == [
        ((), "float32"),
        ((8, 10), "float32"),
        ((8,), "bool"),
    ]


class TripleRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0) * 3


class Awkward(nn.Module):
    """no_grad inside forward, in-place operations, writes through views, a custom autograd.Function, detach."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x)
        with torch.no_grad():
            scale = self.a.weight.abs().mean() * 2
        h = (h * scale).clone()
        h.view(-1)[3] = 1.5
        h[:, 2:4].mul_(2)
        h[h > 1.4] = 0.5
        return TripleRelu.apply(self.b(h) + h.detach()).sum(-1)


def test_no_grad_in_place_views_and_custom_functions_are_exact():
    assert train_both(squares, {"model": Awkward()}, [torch.randn(16, 8)]).worst < CLOSE


class RunningMean(nn.Module):
    """Buffers written in every way that user code has: in place, through a view, by assignment."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("in_place", torch.zeros(4))
        self.register_buffer("view", torch.zeros(3, 4))
        self.register_buffer("assigned", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("untouched", torch.ones(4))

    def forward(self, x):
        y = self.linear(x) * self.untouched
        with torch.no_grad():
            self.in_place.lerp_(y.mean(0), 0.1)
            self.view[1].copy_(y.sum(0))
            self.assigned = 0.9 * self.assigned + 0.1 * y.amax(0)
            self.count += 1
        return y + self.in_place


def test_buffers_written_in_place_through_a_view_or_by_assignment_come_out():
    parity = train_both(squares, {"model": RunningMean()}, [torch.randn(6, 4)])
    assert set(parity.result.new_buffers) == {"model.in_place", "model.view", "model.assigned", "model.count"}
    assert parity.worst < CLOSE


def test_64_bit_integers_are_exact():
    class Hashes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, ids):
            return self.linear(((ids * 6364136223846793005) % 1000).float()[:, None]), ids * ids

    def step(modules, ids):
        out, product = modules["model"](ids)
        return out.mean(), [product]

    parity = train_both(step, {"model": Hashes()}, [torch.tensor([3_000_000_019, -7])])
    assert parity.worst < CLOSE
    assert parity.result.aux[0].tolist() == [
        3_000_000_019**2 - 2**64 if 3_000_000_019**2 >= 2**63 else 3_000_000_019**2,
        49,
    ]


def test_bfloat16_autocast_is_baked_in():
    # Both round activations to 8 bits; sums are taken in other orders, so single gradients differ by a few roundings.
    parity = train_both(classification, {"model": Convolutional()}, images(), autocast=torch.bfloat16)
    assert parity.loss < 1e-3
    assert parity.grads < 3e-2
    assert parity.buffers < 1e-2
    assert "bfloat16" in {
        str(s.expected.dtype) for s in parity.graph.program.instructions if hasattr(s.expected, "dtype")
    }
    assert all(grad.dtype == np.float32 for grad in parity.result.grads.values())


def test_autocast_inside_the_users_function_is_followed():
    def step(modules, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = modules["model"](x)
        assert hidden.dtype == torch.bfloat16
        return hidden.float().square().mean()

    assert train_both(step, {"model": nn.Linear(8, 8)}, [torch.randn(4, 8)]).worst < 1e-2  # bfloat16 roundings


def test_recurrent_networks_are_captured_with_their_own_parameters():
    model = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
    assert (
        train_both(lambda m, x: m["model"](x)[0].square().mean(), {"model": model}, [torch.randn(2, 3, 4)]).worst
        < CLOSE
    )
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


# --- random numbers ------------------------------------------------------------------------------------------------------------


def run_with_key(graph, modules, inputs, seed):
    params, buffers = state_arrays(graph, modules)
    with exact_dtypes():
        return jax.jit(lambda *a: (lambda r: (r.loss, r.aux, r.grads))(run_training(graph, *a)))(
            params, buffers, arrays_of(inputs), jax.random.key(seed)
        )


def test_dropout_draws_from_the_key_and_its_backward_sees_the_same_mask():
    model = {"model": nn.Dropout(0.25)}
    model["scale"] = nn.ParameterList([torch.ones(64, 64)])

    def step(x):
        dropped = model["model"](x * model["scale"][0])
        return dropped.sum(), [dropped]

    inputs = [torch.ones(64, 64)]
    graph = capture_training(step, model, specs_of(inputs), autocast=None)
    _, (dropped,), grads = run_with_key(graph, model, inputs, 0)
    np.testing.assert_array_equal(dropped, grads["scale.0"])  # of a sum: the mask times 1 / 0.75
    # 4096 draws: six standard deviations of the share are 0.04.
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.04
    again, other = run_with_key(graph, model, inputs, 0), run_with_key(graph, model, inputs, 1)
    np.testing.assert_array_equal(dropped, again[1][0])
    assert (np.asarray(dropped) != np.asarray(other[1][0])).any()


def test_two_dropouts_in_one_program_are_independent():
    modules = {"model": nn.Linear(1, 1)}

    def step(x):
        a, b = F.dropout(x, 0.5), F.dropout(x, 0.5)
        return modules["model"](a[:, :1]).sum(), [a, b]

    inputs = [torch.ones(64, 64)]
    graph = capture_training(step, modules, specs_of(inputs), autocast=None)
    _, (a, b), _ = run_with_key(graph, modules, inputs, 0)
    assert 0.4 < float(((a == 0) == (b == 0)).mean()) < 0.6  # half of 4096 agree by chance


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_recomputes_with_the_same_dropout_mask(use_reentrant):
    modules = {"model": nn.Linear(64, 64, bias=False)}
    with torch.no_grad():
        modules["model"].weight.copy_(torch.eye(64))

    def block(x):
        return F.dropout(modules["model"](x), 0.5) ** 2

    def step(x):
        h = checkpoint(block, x.clone().requires_grad_(), use_reentrant=use_reentrant)
        return h.sum(), [h]

    inputs = [torch.ones(64, 64)]
    graph = capture_training(step, modules, specs_of(inputs), autocast=None)
    _, (h,), grads = run_with_key(graph, modules, inputs, 0)
    # With mask m: h = (2 m x)^2, so d sum(h) / d weight[i, j] = sum_b 8 m_bi; another mask would give another sum.
    np.testing.assert_allclose(grads["model.weight"], np.repeat(2 * np.asarray(h).sum(0)[:, None], 64, 1), rtol=1e-6)


def lowered_blocks(wrapped, platform):
    """Four blocks of a transformer's feed-forward shape, captured and lowered for a platform; their weights, and the inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(16, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 16)) for _ in range(4)]
    )
    inputs = [torch.randn(512, 16)]

    def step(x):
        x = x.clone().requires_grad_()
        for block in model:
            x = wrapped(block, x)
        return x.square().mean(), []

    graph = capture_training(step, {"model": model}, specs_of(inputs), autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        run = jax.jit(lambda *a: (lambda r: (r.loss, r.grads))(run_training(graph, *a)))
        arguments = (params, buffers, arrays_of(inputs), jax.random.key(0))
        lowered = run.trace(*arguments).lower(lowering_platforms=(platform,))
        values = lowered.compile()(*arguments) if platform == "cpu" else None
    return lowered, values, model, inputs


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_repeated_block_is_held_back_on_an_accelerator_as_jax_checkpoint_does(use_reentrant):
    lowered, _, _, _ = lowered_blocks(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant), "cuda")
    assert lowered.as_text().count("optimization_barrier") == 2 * 4  # one for what was computed, one for parameters


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_take_less_memory_than_plain_ones_and_than_jaxs_own(use_reentrant):
    plain, expected, model, inputs = lowered_blocks(lambda block, x: block(x), "cpu")
    held, values, _, _ = lowered_blocks(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant), "cpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), values, expected)

    @jax.checkpoint
    def block(x, w1, b1, w2, b2):
        return jax.nn.gelu(x @ w1.T + b1) @ w2.T + b2

    def loss(blocks, x):
        for weights in blocks:
            x = block(x, *weights)
        return jax.numpy.square(x).mean()

    weights = [[p.detach().numpy() for p in part.parameters()] for part in model]
    own = jax.jit(jax.value_and_grad(loss)).lower(weights, inputs[0].numpy()).compile()

    def temporary_bytes(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(held.compile()) < 0.5 * temporary_bytes(plain.compile())
    assert temporary_bytes(held.compile()) <= temporary_bytes(own)


def test_a_checkpointed_batch_norm_in_two_halves_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(PrepareError, match=r"the backward pass writes to model\.1\.running_mean"):
        capture_vjp(
            lambda x: [checkpoint(model, x, use_reentrant=False)],
            {"model": model},
            [TensorSpec((3, 4), torch.float32)],
            autocast=None,
        )


def test_a_checkpointed_batch_norm_updates_twice_in_one_program_as_in_torch():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    parity = train_both(
        lambda m, x: (checkpoint(m["model"], x, use_reentrant=False) ** 3).mean(),
        {"model": model},
        [torch.randn(5, 4)],
    )
    assert int(parity.result.new_buffers["model.1.num_batches_tracked"]) == int(
        parity.eager["model"][1].num_batches_tracked
    )
    assert parity.worst < CLOSE


# --- errors --------------------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Branch())

    def forward(self, x):
        return self.inner(x)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch that the test looks for
            return x * 2
        return x


def test_a_branch_on_a_tensors_value_names_operation_module_and_line():
    model = Branching()
    with pytest.raises(PrepareError) as caught:
        capture_training(
            lambda x: (model(x).sum(), []), {"model": model}, [TensorSpec((2, 4), torch.float32)], autocast=None
        )
    text = str(caught.value)
    assert "_local_scalar_dense" in text
    assert "in module 'model.inner.1'" in text
    assert "test_capture.py" in text
    assert "the branch that the test looks for" in text
    assert "hint: " in text
    assert "torch.where" in text


def test_a_shape_that_depends_on_values_is_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(PrepareError, match=r"the shape of the result of aten\.nonzero.*depends on values"):
        capture_training(
            lambda x: (model(x[x[:, 0] > 0]).sum(), []),
            {"model": model},
            [TensorSpec((2, 4), torch.float32)],
            autocast=None,
        )


@torch.library.custom_op("polyaccel_tests::whiten", mutates_args=())
def whiten(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean()


@torch.library.custom_op("polyaccel_tests::sharpen", mutates_args=())
def sharpen(x: torch.Tensor) -> torch.Tensor:
    return x * x.abs()


whiten.register_fake(torch.empty_like)
sharpen.register_fake(torch.empty_like)


def test_every_operation_without_lowering_is_named_at_once_with_its_place():
    class Exotic(nn.Module):
        def forward(self, x):
            return x * whiten(x.detach())

    modules = {"model": nn.Linear(3, 3), "exotic": nn.Sequential(Exotic())}

    def step(x):
        h = modules["exotic"](modules["model"](x))
        return (h * sharpen(h.detach())).sum(), []

    with pytest.raises(UnsupportedError) as caught:
        capture_training(step, modules, [TensorSpec((3, 3), torch.float32)], autocast=None)
    text = str(caught.value)
    assert "2 operations have no lowering" in text
    assert "polyaccel_tests.whiten.default in module 'exotic.0'" in text
    assert "return x * whiten(x.detach())" in text
    assert "polyaccel_tests.sharpen.default outside any module" in text
    assert "hint:" in text


def test_a_generator_of_the_users_own_is_refused():
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 4)
    with pytest.raises(
        UnsupportedError, match=r"(?s)torch\.Generator of its own.*torch\.rand\(2, 4, generator=generator\)"
    ):
        capture_forward(
            lambda x: [model(x) + torch.rand(2, 4, generator=generator)],
            {"model": model},
            [TensorSpec((2, 4), torch.float32)],
            autocast=None,
        )


def test_a_loss_that_is_no_scalar_or_reaches_no_parameter_is_refused():
    model = nn.Linear(4, 4)
    spec = [TensorSpec((2, 4), torch.float32)]
    with pytest.raises(PrepareError, match=r"shape \(2, 4\)"):
        capture_training(lambda x: (model(x), []), {"model": model}, spec, autocast=None)
    with pytest.raises(PrepareError, match="no trainable parameter"):
        capture_training(lambda x: (model(x).detach().sum(), []), {"model": model}, spec, autocast=None)


def test_a_lazy_module_is_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(PrepareError, match=r"model\.0\.weight of the lazy module LazyLinear"):
        capture_forward(lambda x: [model(x)], {"model": model}, [TensorSpec((2, 4), torch.float32)], autocast=None)


def test_a_lowering_with_a_wrong_dtype_is_caught_while_tracing(monkeypatch):
    aten = torch.ops.aten
    monkeypatch.setitem(LOWERINGS, aten.mm.default, Lowering(lambda a, b: (a @ b).astype(jnp.float16)))
    model = nn.Linear(4, 4, bias=False)
    graph = capture_forward(lambda x: [model(x)], {"model": model}, [TensorSpec((2, 4), torch.float32)], autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with (
        exact_dtypes(),
        pytest.raises(PolyaccelError, match=r"aten\.mm\.default gave float16\[2, 4\] instead of float32\[2, 4\]"),
    ):
        run_forward(graph, params, buffers, arrays_of([torch.ones(2, 4)]), jax.random.key(0))


def test_an_array_of_another_shape_or_width_than_captured_is_named():
    model = nn.BatchNorm1d(4)
    graph = capture_forward(lambda x: [model(x)], {"model": model}, [TensorSpec((2, 4), torch.float32)], autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with (
        exact_dtypes(),
        pytest.raises(PolyaccelError, match=r"input 0 was captured as float32\[2, 4\], but is float32\[3, 4\]"),
    ):
        run_forward(graph, params, buffers, arrays_of([torch.ones(3, 4)]), jax.random.key(0))
    buffers["model.num_batches_tracked"] = jnp.zeros((), jnp.int32)
    with pytest.raises(PolyaccelError, match=r"model\.num_batches_tracked was captured as int64\[\], but is int32\[\]"):
        run_forward(graph, params, buffers, arrays_of([torch.ones(2, 4)]), jax.random.key(0))
