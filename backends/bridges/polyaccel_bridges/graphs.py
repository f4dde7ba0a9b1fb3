"""What a capture is made from and what it gives: specs of tensors that do not exist yet, and the Programs of one captured function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .programs import ArraySpec, Program


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TrainingGraph:
    """Forward, loss and backward of one step as a Program; run it with `replay.run_training`.

    `state_names`: every parameter and buffer it takes, in order, with whether it is a parameter. `grad_names`: the parameters
    that the loss reaches. `buffer_names`: the buffers (and parameters, if the function writes to one) that it changes.
    `tied`: every further name of a shared parameter or buffer -> the one name it is kept under.
    `output_specs`: loss, then aux. `mutated_inputs`: the inputs that the function wrote to in place. `input_grads`: the inputs
    that get a gradient, in the order in which it comes out.
    """

    program: Program
    state_names: tuple[tuple[str, bool], ...]
    grad_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    num_aux: int
    output_specs: tuple[ArraySpec, ...]
    mutated_inputs: tuple[int, ...]
    input_grads: tuple[int, ...] = ()


def written_params(graph: TrainingGraph | ForwardGraph | VjpGraph) -> frozenset[str]:
    """The parameters that captured code writes to in place."""
    params = {name for name, is_param in graph.state_names if is_param}
    return frozenset(params.intersection(graph.buffer_names))


@dataclass(frozen=True, slots=True, eq=False)
class ForwardGraph:
    """A function without gradients as a Program; run it with `replay.run_forward`. Fields as in TrainingGraph."""

    program: Program
    state_names: tuple[tuple[str, bool], ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    output_specs: tuple[ArraySpec, ...]
    mutated_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class VjpGraph:
    """A function and its vector-Jacobian product as two Programs; run them with `replay.run_vjp_forward` and `run_vjp_backward`.

    `differentiable`: for each output, whether it has a gradient. `input_grads`: for each input, whether it gets one. Other
    fields as in TrainingGraph.
    """

    forward: Program
    backward: Program
    num_residuals: int
    state_names: tuple[tuple[str, bool], ...]
    grad_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    output_specs: tuple[ArraySpec, ...]
    differentiable: tuple[bool, ...]
    input_grads: tuple[bool, ...]
    mutated_inputs: tuple[int, ...]
