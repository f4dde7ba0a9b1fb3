"""What the torch engine makes of a model: the user's own object, autocast around its call, compiled on request."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch_network import X, Y, accelerator, mean_squared_error, network

from polyaccel.errors import PrepareError
from polyaccel_torch.dialect.modules import add_autocast


def test_in_one_process_the_prepared_model_is_the_users_own():
    model = network()
    prepared = accelerator().prepare(model)
    assert prepared is model
    assert "forward" not in vars(prepared)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_in_half_and_returns_float32(precision, dtype):
    model = network()
    inside = []
    model[0].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    engine = accelerator(mixed_precision=precision)
    prepared = engine.prepare(model)
    assert prepared(X).dtype == torch.float32
    assert inside == [dtype]
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    assert engine.unwrap_model(prepared).forward.__func__ is nn.Sequential.forward


def test_half_precision_outputs_are_cast_in_any_nesting():
    Pair = collections.namedtuple("Pair", "first second")

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        extra: dict

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            y = self.layer(x)
            return Output(y, {"pair": Pair(y, [y, "text", y.argmax(-1)])})

    output = accelerator(mixed_precision="bf16").prepare(Nested())(X)
    pair = output.extra["pair"]
    assert isinstance(output, Output)
    assert isinstance(pair, Pair)
    assert [output.logits.dtype, pair.first.dtype, pair.second[0].dtype] == [torch.float32] * 3
    assert pair.second[1] == "text"
    assert pair.second[2].dtype == torch.int64


def test_an_error_in_forward_leaves_autocast():
    model = network()
    prepared = accelerator(mixed_precision="bf16").prepare(model)
    with pytest.raises(RuntimeError, match="shapes"):
        prepared(torch.ones(1, 3))
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_prepared_for_another_precision_has_that_one_only():
    model = network()
    accelerator(mixed_precision="bf16").prepare(model)
    assert accelerator().prepare(model)[0](X).dtype == torch.float32
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(X)
    assert seen == [torch.float32]


def test_a_model_under_autocast_can_be_copied_and_pickled():
    model = accelerator(mixed_precision="bf16").prepare(network())
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


def test_preparing_a_model_again_gives_the_same_object():
    engine = accelerator()._engine
    engine_with_compile = accelerator(compile=True, compile_backend="eager")._engine
    for each in (engine, engine_with_compile):
        model = network()
        handle = each.prepare_model(model)
        assert each.prepare_model(model) is handle
        assert each.prepare_model(handle) is handle
        assert each.unwrap(handle) is model


def test_a_model_that_user_code_drops_is_freed():
    import gc
    import weakref

    engine = accelerator(compile=True, compile_backend="eager")._engine
    model = network()
    engine.prepare_model(model)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_model_computes_the_same(precision):
    batch = (X, Y)
    losses = {}
    for is_compiled in (False, True):
        run = accelerator(compile=is_compiled, compile_backend="aot_eager", mixed_precision=precision)
        model = network()
        prepared, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        step = run.train_step(mean_squared_error, prepared, optimizer)
        losses[is_compiled] = [step(batch).item() for _ in range(3)]
        assert run.unwrap_model(prepared) is model
        assert (prepared is model) != is_compiled
    # aot_eager runs the same kernels on another graph: equal up to the order of a few sums.
    assert losses[True] == pytest.approx(losses[False], rel=1e-6 if precision == "no" else 1e-2)


def test_a_model_without_values_is_refused_by_parameter_name():
    with torch.device("meta"):
        model = network()
    with pytest.raises(PrepareError, match=r"Sequential\.0\.weight is on the meta device"):
        accelerator().prepare(model)


def test_float16_parameters_cannot_be_trained_with_a_scaled_loss():
    with pytest.raises(PrepareError, match=r"0\.weight is float16"):
        accelerator(mixed_precision="fp16").prepare(network().half())


def test_autocast_is_available_outside_the_model():
    run = accelerator(mixed_precision="bf16")
    with run.autocast():
        assert (X @ X.T).dtype == torch.bfloat16
    assert (X @ X.T).dtype == torch.float32


def test_autocast_hooks_are_exchanged_not_stacked():
    model = network()
    for _ in range(3):
        add_autocast(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
