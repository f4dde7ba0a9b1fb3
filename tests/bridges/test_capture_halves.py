"""The other captures (forward alone, forward and vjp apart) and the programs that all of them become.

Tolerance: 1e-5 of the largest value, float32 sums in another order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured_parity import arrays_of, error, specs_of, state_arrays, train_both
from torch import nn

from polyaccel_bridges import programs
from polyaccel_bridges.capture import capture_forward, capture_training, capture_vjp
from polyaccel_bridges.graphs import TensorSpec
from polyaccel_bridges.replay import exact_dtypes, run_forward, run_training, run_vjp_backward, run_vjp_forward

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- forward and vjp ------------------------------------------------------------------------------------------------------------


def test_forward_in_evaluation_mode_equals_torch_and_writes_no_buffer():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    ).eval()
    inputs = [torch.randn(8, 1, 8, 8)]
    graph = capture_forward(lambda x: [model(x)], {"model": model}, specs_of(inputs), autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        outputs, written = jax.jit(lambda *a: run_forward(graph, *a))(
            params, buffers, arrays_of(inputs), jax.random.key(0)
        )
    assert written == {}
    assert error(outputs[0], model(*inputs)) < CLOSE
    assert [spec.shape for spec in graph.output_specs] == [(8, 10)]


def test_vjp_gives_torchs_gradients_for_any_cotangent():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.GELU())
    x = torch.randn(5, 4, requires_grad=True)
    ids = torch.arange(5)

    def function(x, ids):
        h = model(x)
        return [h, h.argmax(-1), h.sum(0) * ids.sum()]

    modules = {"model": model}
    graph = capture_vjp(function, modules, specs_of([x, ids]), autocast=None)
    assert graph.differentiable == (True, False, True)
    assert graph.input_grads == (True, False)
    params, buffers = state_arrays(graph, modules)
    with exact_dtypes():
        outputs, written, residuals = jax.jit(lambda *a: run_vjp_forward(graph, *a))(
            params, buffers, arrays_of([x, ids]), jax.random.key(0)
        )
        cotangents = [torch.randn(5, 6), None, torch.randn(6)]
        seeds = [None if c is None else arrays_of([c])[0] for c in cotangents]
        grads, input_grads = jax.jit(lambda *a: run_vjp_backward(graph, *a))(residuals, seeds)
    expected = function(x, ids)
    torch.autograd.backward([expected[0], expected[2]], [cotangents[0], cotangents[2]])
    assert max(error(a, b) for a, b in zip(outputs, expected, strict=True)) < CLOSE
    assert max(error(grads[f"model.{n}"], p.grad) for n, p in model.named_parameters()) < CLOSE
    assert error(input_grads[0], x.grad) < CLOSE
    assert input_grads[1] is None
    assert error(written["model.1.running_mean"], model[1].running_mean) < CLOSE


def test_a_missing_cotangent_means_zeros():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    graph = capture_vjp(lambda x: [model(x), model(x) * 5], {"model": model}, specs_of([x]), autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        _, _, residuals = run_vjp_forward(graph, params, buffers, arrays_of([x]), jax.random.key(0))
        grads, _ = run_vjp_backward(graph, residuals, [jnp.ones((4, 2), np.float32), None])
    np.testing.assert_allclose(grads["model.bias"], [4.0, 4.0])


def test_forward_and_backward_halves_share_their_random_draws():
    modules = {"model": nn.ParameterList([torch.ones(64, 64)])}
    graph = capture_vjp(lambda: [F.dropout(modules["model"][0], 0.5)], modules, [], autocast=None)
    params, buffers = state_arrays(graph, modules)
    with exact_dtypes():
        (out,), _, residuals = run_vjp_forward(graph, params, buffers, [], jax.random.key(3))
        grads, _ = run_vjp_backward(graph, residuals, [jnp.ones((64, 64), np.float32)])
    np.testing.assert_array_equal(out, grads["model.0"])


def test_the_backward_half_recomputes_no_matrix_product_of_the_forward():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = capture_vjp(lambda x: [model(x)], {"model": model}, [TensorSpec((3, 4), torch.float32)], autocast=None)
    products = [sum("mm" in step.name for step in half.instructions) for half in (graph.forward, graph.backward)]
    assert products == [2, 3]  # two weight gradients and one activation gradient


# --- programs -------------------------------------------------------------------------------------------------------------------


def test_tensors_that_the_function_closes_over_become_constants():
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    model = nn.Linear(3, 3)
    parity = train_both(lambda m, x: (m["model"](x) * weights).square().mean(), {"model": model}, [torch.randn(2, 3)])
    assert parity.worst < CLOSE
    assert [(c.shape, c.dtype.name) for c in parity.graph.program.constants] == [((3,), "bfloat16")]


def test_results_are_strongly_typed_so_that_feeding_them_back_does_not_trace_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graph = capture_forward(lambda x: [model(x)], {"model": model}, [TensorSpec((6, 4), torch.float32)], autocast=None)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        run = jax.jit(lambda *a: run_forward(graph, *a))
        for _ in range(2):
            _, written = run(params, buffers, arrays_of([torch.randn(6, 4)]), jax.random.key(0))
            buffers = {**buffers, **written}
        assert run._cache_size() == 1


def test_outputs_may_be_inputs_constants_or_parameters():
    model, constant = nn.Linear(2, 2), torch.tensor([1.0, 2.0])

    def step(x):
        return model(x).sum(), [x, constant, model.weight, torch.tensor(3)]

    graph = capture_training(step, {"model": model}, [TensorSpec((2, 2), torch.float32)], autocast=None)
    x = torch.randn(2, 2)
    params, buffers = state_arrays(graph, {"model": model})
    with exact_dtypes():
        aux = jax.jit(lambda *a: run_training(graph, *a).aux)(params, buffers, arrays_of([x]), jax.random.key(0))
    assert [error(a, b) for a, b in zip(aux, step(x)[1], strict=True)] == [0.0] * 4


def test_an_input_written_in_place_is_reported():
    model = nn.Linear(2, 2)
    graph = capture_forward(
        lambda x, y: [model(x.add_(1)) + y], {"model": model}, [TensorSpec((2, 2), torch.float32)] * 2, autocast=None
    )
    assert graph.mutated_inputs == (0,)


@torch.library.custom_op("polyaccel_tests::blur", mutates_args=())
def blur(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean()


blur.register_fake(torch.empty_like)


def test_dead_operations_are_cut_from_the_program():
    model = nn.Linear(3, 3)

    def step(x):
        blur(model(x).detach())  # has no lowering, and nothing needs it
        return model(x).sum(), []

    graph = capture_training(step, {"model": model}, [TensorSpec((3, 3), torch.float32)], autocast=None)
    assert not any("blur" in instruction.name for instruction in graph.program.instructions)
    assert isinstance(graph.program, programs.Program)
