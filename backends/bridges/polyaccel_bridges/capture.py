"""PyTorch turns functions over nn.Modules into Programs: one training step, a forward pass, or the two halves of a vjp."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.fx import Node

from .captured_gradients import COTANGENT
from .graphs import ForwardGraph, TensorSpec, TrainingGraph, VjpGraph
from .programs import ArraySpec, Program, compile_program, refuse_missing
from .tracing import trace


def capture_training(
    function: Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> TrainingGraph:
    """The step `function(*inputs) -> (scalar loss, auxiliary tensors)`, which closes over `modules`, with its gradients.

    Auxiliary tensors come out detached. With `autocast` the function runs under `torch.autocast("cpu", autocast)`.

    Raises:
        PrepareError: control flow or shapes depend on values; the loss is no scalar or reaches no parameter.
        UnsupportedError: operations without lowering, all of them at once.
    """
    traced = trace(function, modules, inputs, autocast, "training")
    reached = [(name, node) for name, node in zip(traced.wanted, traced.grads, strict=True) if node is not None]
    grads = [(name, node) for name, node in reached if isinstance(name, str)]
    by_input = [(index, node) for index, node in reached if isinstance(index, int)]
    written = (node for _, node in traced.written)
    nodes = [*traced.outputs, *(node for _, node in grads), *written, *(node for _, node in by_input)]
    refuse_missing(traced.module.graph, nodes)
    program = compile_program(traced.module, traced.inputs, nodes)
    return TrainingGraph(
        program=program,
        state_names=traced.state.names,
        grad_names=tuple(name for name, _ in grads),
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        num_aux=len(traced.outputs) - 1,
        output_specs=_specs(program, len(traced.outputs)),
        mutated_inputs=traced.mutated_inputs,
        input_grads=tuple(index for index, _ in by_input),
    )


def capture_forward(
    function: Callable[..., Sequence[torch.Tensor]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> ForwardGraph:
    """`function(*inputs) -> tensors` under `torch.no_grad()`. Raises as `capture_training`."""
    traced = trace(function, modules, inputs, autocast, "forward")
    nodes = [*traced.outputs, *(node for _, node in traced.written)]
    refuse_missing(traced.module.graph, nodes)
    program = compile_program(traced.module, traced.inputs, nodes)
    return ForwardGraph(
        program=program,
        state_names=traced.state.names,
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        output_specs=_specs(program, len(traced.outputs)),
        mutated_inputs=traced.mutated_inputs,
    )


def capture_vjp(
    function: Callable[..., Sequence[torch.Tensor]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> VjpGraph:
    """`function(*inputs) -> tensors` as two halves: forward, and from the outputs' cotangents to parameter and input gradients.

    Raises as `capture_training`.
    """
    traced = trace(function, modules, inputs, autocast, "vjp")
    graph = traced.module.graph
    seeds = {node.meta[COTANGENT]: node for node in graph.nodes if COTANGENT in node.meta}
    differentiable = tuple(index in seeds for index in range(len(traced.outputs)))
    params = [(n, node) for n, node in zip(traced.wanted, traced.grads, strict=True) if isinstance(n, str) and node]
    by_input = {n: node for n, node in zip(traced.wanted, traced.grads, strict=True) if isinstance(n, int)}
    gradients = [*(node for _, node in params), *(by_input.get(index) for index in range(len(inputs)))]

    written = [node for _, node in traced.written]
    refuse_missing(graph, [*traced.outputs, *written, *gradients])

    # Everything traced before the first cotangent is the forward; what the backward takes from it are the residuals.
    forward_nodes: set[Node] = set()
    for node in graph.nodes:
        if COTANGENT in node.meta:
            break
        if node.op != "get_attr":
            forward_nodes.add(node)
    residuals = _frontier(gradients, forward_nodes, set(seeds.values()))
    forward = compile_program(traced.module, traced.inputs, [*traced.outputs, *written, *residuals])
    given = {f"residual {index}": node for index, node in enumerate(residuals)}
    given |= {f"the cotangent of output {index}": seeds[index] for index in sorted(seeds)}
    backward = compile_program(traced.module, given, gradients)
    return VjpGraph(
        forward=forward,
        backward=backward,
        num_residuals=len(residuals),
        state_names=traced.state.names,
        grad_names=tuple(str(name) for name, _ in params),
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        output_specs=_specs(forward, len(traced.outputs)),
        differentiable=differentiable,
        input_grads=tuple(by_input.get(index) is not None for index in range(len(inputs))),
        mutated_inputs=traced.mutated_inputs,
    )


def _specs(program: Program, count: int) -> tuple[ArraySpec, ...]:
    return tuple(spec for spec in program.output_specs[:count] if spec is not None)


def _frontier(targets: Sequence[Node | None], forward: set[Node], given: set[Node]) -> list[Node]:
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = [node for node in targets if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen or node in given:
            continue
        seen.add(node)
        if node in forward:
            found[node] = None
        else:
            waiting.extend(node.all_input_nodes)
    return list(found)
