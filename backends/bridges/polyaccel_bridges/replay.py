"""Runs captured programs in jnp, inside whatever jax trace is active; every result is held against what PyTorch said it is.

64-bit integers are exact: whoever jits and calls these functions does both inside `exact_dtypes()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from polyaccel.errors import PolyaccelError

from .lowerings import library_attention
from .lowerings.attention import flash_attention_backward
from .programs import ArraySpec, Instruction, Program, Slot

if TYPE_CHECKING:
    from .graphs import ForwardGraph, TrainingGraph, VjpGraph

Arrays = Mapping[str, jax.Array]


def exact_dtypes() -> AbstractContextManager[None]:
    """While active, jax keeps 64-bit types. Enter it around `jax.jit`'s first call and every later one: it is part of the cache key."""
    context: AbstractContextManager[None] = jax.enable_x64(True)
    return context


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`grads` has an entry for every parameter that the loss reaches, `new_buffers` one for every tensor that the function wrote,
    `input_grads` one for every one of the graph's own `input_grads`."""

    loss: jax.Array
    aux: list[jax.Array]
    grads: dict[str, jax.Array]
    new_buffers: dict[str, jax.Array]
    input_grads: list[jax.Array] = field(default_factory=list)


def run_training(
    graph: TrainingGraph, params: Arrays, buffers: Arrays, inputs: Sequence[jax.Array], key: jax.Array
) -> TrainingResult:
    """Loss, auxiliary values, gradients and written buffers of one step.

    `params` and `buffers` are flat dicts by `<module key>.<dotted name>`, a tied parameter under its first name;
    `key` is a jax PRNG key that every random operation draws from.
    """
    outputs = run_program(graph.program, [*_state(graph.state_names, params, buffers), *inputs], key)
    sizes = 1, graph.num_aux, len(graph.grad_names), len(graph.buffer_names), len(graph.input_grads)
    loss, aux, grads, written, input_grads = _split(outputs, *sizes)
    return TrainingResult(
        loss=loss[0],
        aux=aux,
        grads=dict(zip(graph.grad_names, grads, strict=True)),
        new_buffers=dict(zip(graph.buffer_names, written, strict=True)),
        input_grads=input_grads,
    )


def run_forward(
    graph: ForwardGraph, params: Arrays, buffers: Arrays, inputs: Sequence[jax.Array], key: jax.Array
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """The outputs and the written buffers."""
    outputs = run_program(graph.program, [*_state(graph.state_names, params, buffers), *inputs], key)
    values, written = _split(outputs, len(graph.output_specs), len(graph.buffer_names))
    return values, dict(zip(graph.buffer_names, written, strict=True))


def run_vjp_forward(
    graph: VjpGraph, params: Arrays, buffers: Arrays, inputs: Sequence[jax.Array], key: jax.Array
) -> tuple[list[jax.Array], dict[str, jax.Array], tuple[jax.Array, ...]]:
    """The outputs, the written buffers and the residuals for `run_vjp_backward` (a pytree of arrays, random masks included)."""
    outputs = run_program(graph.forward, [*_state(graph.state_names, params, buffers), *inputs], key)
    values, written, residuals = _split(outputs, len(graph.output_specs), len(graph.buffer_names), graph.num_residuals)
    if graph.backward.draws_randomly:
        residuals.append(key)
    return values, dict(zip(graph.buffer_names, written, strict=True)), tuple(residuals)


def run_vjp_backward(
    graph: VjpGraph, residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array | None]
) -> tuple[dict[str, jax.Array], list[jax.Array | None]]:
    """Gradients by parameter name, and of every input (None where it needs or gets none).

    One cotangent per output, of the output's shape and dtype; None means zeros, and those of outputs that are not
    `differentiable` are ignored.
    """
    key = residuals[-1] if graph.backward.draws_randomly else None
    seeds = [
        jnp.zeros(spec.shape, spec.dtype) if cotangent is None else cotangent
        for cotangent, spec, wanted in zip(cotangents, graph.output_specs, graph.differentiable, strict=True)
        if wanted
    ]
    outputs = run_program(graph.backward, [*residuals[: graph.num_residuals], *seeds], key)
    grads, input_grads = _split(outputs, len(graph.grad_names), len(graph.backward.outputs) - len(graph.grad_names))
    return dict(zip(graph.grad_names, grads, strict=True)), input_grads


def run_program(program: Program, inputs: Sequence[jax.Array], key: jax.Array | None) -> list[Any]:
    """The outputs of `program`. Raises PolyaccelError where a lowering gives another shape or dtype than PyTorch."""
    _check_inputs(program, inputs)
    values: list[Any] = [None] * program.num_values
    values[: len(inputs)] = inputs
    for index, constant in enumerate(program.constants, start=len(inputs)):
        values[index] = jnp.asarray(constant)
    has_backward = any(step.lowering.function is flash_attention_backward for step in program.instructions)
    with library_attention.pairing(has_backward):
        for step in program.instructions:
            values[step.result] = _execute(step, values, key)
            for index in step.frees:
                values[index] = None
    # A weakly typed result (of a Python number) would make the next step, fed with it, trace again.
    return [
        None if slot is None or spec is None else lax.convert_element_type(values[slot.index], spec.dtype)
        for slot, spec in zip(program.outputs, program.output_specs, strict=True)
    ]


def _check_inputs(program: Program, inputs: Sequence[jax.Array]) -> None:
    if len(inputs) != len(program.input_specs):
        raise PolyaccelError(f"the captured program takes {len(program.input_specs)} arrays, not {len(inputs)}")
    for name, spec, given in zip(program.input_names, program.input_specs, inputs, strict=True):
        if tuple(given.shape) != spec.shape or given.dtype != spec.dtype:
            raise PolyaccelError(
                f"{name} was captured as {spec.dtype}{list(spec.shape)}, but is {given.dtype}{list(given.shape)}",
                "capture anew for other shapes; 64-bit types need `exact_dtypes()` around the making of arrays too",
            )


def _execute(step: Instruction, values: list[Any], key: jax.Array | None) -> Any:
    args = [_fill(arg, values) for arg in step.args]
    kwargs = {name: _fill(arg, values) for name, arg in step.kwargs.items()}
    if step.draw is not None:
        if key is None:
            raise PolyaccelError(f"{step.name} {step.source} draws random numbers, but no key was given")
        args.insert(0, jax.random.fold_in(key, step.draw))
    try:
        result = step.lowering.function(*args, **kwargs)
    except Exception as error:
        error.add_note(f"while replaying {step.name} {step.source}")
        raise
    _check(step, result)
    return result


def _fill(value: Any, values: list[Any]) -> Any:
    kind = type(value)
    if kind is Slot:
        return values[value.index]
    if kind is tuple:
        return [_fill(item, values) for item in value]
    return value


def _check(step: Instruction, result: Any) -> None:
    if step.expected is None:
        return
    if isinstance(step.expected, ArraySpec):
        pairs = [(result, step.expected)]
    else:
        if len(result) != len(step.expected):
            raise PolyaccelError(
                f"the lowering of {step.name} gave {len(result)} results instead of {len(step.expected)}"
            )
        pairs = [(value, spec) for value, spec in zip(result, step.expected, strict=True) if spec is not None]
    for value, spec in pairs:
        if value is None or tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            got = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
            raise PolyaccelError(
                f"the lowering of {step.name} gave {got} instead of {spec.dtype}{list(spec.shape)} ({step.source})",
                "this is a defect of polyaccel: please report it with this message, and use the torch backend meanwhile",
            )


def _state(names: Sequence[tuple[str, bool]], params: Arrays, buffers: Arrays) -> list[jax.Array]:
    return [(params if is_param else buffers)[name] for name, is_param in names]


def _split(values: list[Any], *sizes: int) -> list[list[Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return parts
