"""Runs a function over torch modules twice, by PyTorch eager and captured and replayed by jax, and measures how far apart they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from polyaccel_bridges.capture import capture_training
from polyaccel_bridges.graphs import TensorSpec, TrainingGraph
from polyaccel_bridges.programs import constant_array
from polyaccel_bridges.replay import TrainingResult, exact_dtypes, run_training

torch.set_num_threads(1)
Modules = Mapping[str, nn.Module]
Step = Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]]


def specs_of(tensors: Sequence[torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]


def arrays_of(tensors: Sequence[torch.Tensor]) -> list[jax.Array]:
    with exact_dtypes():
        return [jax.numpy.asarray(constant_array(t)) for t in tensors]


def state_arrays(graph: Any, modules: Modules) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The parameters and buffers that `graph` takes, from the modules' own values."""
    found: dict[str, torch.Tensor] = {}
    for key, module in modules.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found.setdefault(f"{key}.{name}", tensor)
    params, buffers = ({}, {})
    for name, is_param in graph.state_names:
        (params if is_param else buffers)[name] = arrays_of([found[name]])[0]
    return params, buffers


def to_torch(array: Any) -> torch.Tensor:
    numpy = np.asarray(array)
    wide = numpy.astype(np.float64) if numpy.dtype.kind not in "iub" else numpy
    return torch.from_numpy(np.array(wide))


def error(array: Any, tensor: torch.Tensor, floor: float = 1e-6) -> float:
    """The largest difference over the largest value (`floor` where all are smaller: rounding noise around zero)."""
    expected = tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.detach()
    got = to_torch(array)
    assert got.shape == expected.shape
    if not expected.numel():
        return 0.0
    if not tensor.is_floating_point():
        return float((got != expected).any())
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(floor))


@dataclass(frozen=True)
class Parity:
    graph: TrainingGraph
    result: TrainingResult
    eager: dict[str, nn.Module]
    loss: float
    grad_errors: dict[str, float]
    buffer_errors: dict[str, float]
    aux_errors: list[float]

    @property
    def grads(self) -> float:
        return max(self.grad_errors.values(), default=0.0)

    @property
    def buffers(self) -> float:
        return max(self.buffer_errors.values(), default=0.0)

    @property
    def worst(self) -> float:
        return max(self.loss, self.grads, self.buffers, *self.aux_errors)


def train_both(
    step: Callable[..., Any],
    modules: Modules,
    inputs: Sequence[torch.Tensor],
    *,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    floor: float = 1e-6,
) -> Parity:
    """`step(modules, *inputs) -> loss` or `(loss, aux)`: one step captured and in eager, on equal modules."""

    def run(held: Modules, *args: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        out = step(held, *args)
        return out if isinstance(out, tuple) else (out, [])

    eager = {key: copy.deepcopy(module) for key, module in modules.items()}
    graph = capture_training(lambda *args: run(modules, *args), modules, specs_of(inputs), autocast=autocast)
    params, buffers = state_arrays(graph, modules)
    with exact_dtypes():
        arguments = (params, buffers, arrays_of(inputs), jax.random.key(seed))
        lowered = jax.jit(lambda *args: _flat(run_training(graph, *args))).lower(*arguments)
        # The test is about meaning: without the compiler's expensive passes it takes half the time.
        result = TrainingResult(*lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments))
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss, aux = run(eager, *inputs)
    loss.backward()

    expected_grads = {
        f"{key}.{name}": p.grad
        for key, module in eager.items()
        for name, p in module.named_parameters()
        if p.grad is not None and f"{key}.{name}" not in graph.tied
    }
    assert set(result.grads) == set(expected_grads), "gradients for exactly the parameters that torch gives one"
    expected_buffers = {f"{k}.{n}": b for k, m in eager.items() for n, b in m.named_buffers()}
    return Parity(
        graph,
        result,
        eager,
        loss=error(result.loss, loss),
        grad_errors={name: error(result.grads[name], grad, floor) for name, grad in expected_grads.items()},
        buffer_errors={name: error(b, expected_buffers[name]) for name, b in result.new_buffers.items()},
        aux_errors=[error(a, b) for a, b in zip(result.aux, aux, strict=True)],
    )


def _flat(result: TrainingResult) -> tuple[Any, ...]:
    return result.loss, result.aux, result.grads, result.new_buffers
