"""Gradients with respect to what user code made: inputs that require grad, and what torch.autograd.grad is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from polyaccel.errors import UnsupportedError

from .exchange import fetch
from .tensors import ArrayCell, DeviceParameter, DeviceTensor

if TYPE_CHECKING:
    from .tape import Recorder

_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is the desired"
    " behavior."
)
_INSIDE = "compute it inside a loss function (requires_grad_() and torch.autograd.grad): accelerator.backward(loss_fn, model, batch)"


def receive(engine: Any, by_input: Sequence[tuple[torch.Tensor, Any]], scale: float, *, retain_graph: bool) -> None:
    """Give inputs their gradients times `scale`: PyTorch goes on from there, to `.grad` or through what made them. Waits for the device."""
    if not by_input:
        return
    gradients = [fetch(engine, array) for _, array in by_input]
    torch.autograd.backward(
        [tensor for tensor, _ in by_input],
        gradients if scale == 1.0 else [gradient * scale for gradient in gradients],
        retain_graph=retain_graph,
    )


def gradients_of(
    recorder: Recorder, loss: DeviceTensor, wanted: Sequence[torch.Tensor], *, retain_graph: bool
) -> list[torch.Tensor | None]:
    """The gradients of a recorded scalar with respect to parameters of prepared models and to tensors that went into it.

    None where it does not depend on one. Parameters' gradients stay on the device. Raises UnsupportedError for values that a
    model computed, and in a job of several processes.
    """
    from .tape_calls import loss_call

    if recorder.num_processes > 1:
        raise UnsupportedError(
            "torch.autograd.grad on a prepared model's output in a job of several processes", _INSIDE
        )
    for tensor in wanted:
        if isinstance(tensor, DeviceTensor) and not isinstance(tensor, DeviceParameter):
            raise UnsupportedError(
                f"the gradient with respect to a value of shape {tuple(tensor.shape)} that a prepared model computed",
                _INSIDE,
            )
        if not tensor.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
    plain = [tensor for tensor in wanted if not isinstance(tensor, DeviceTensor)]
    found: dict[int, torch.Tensor | None] = {}

    def keep(by_parameter: dict[str, Any], by_input: list[tuple[torch.Tensor, Any]]) -> None:
        for tensor in wanted:
            if isinstance(tensor, DeviceParameter):
                cell = tensor._cell
                array = by_parameter.get(f"{cell._model.handle.name}.{cell.name}")
                if array is not None:
                    found[id(tensor)] = DeviceTensor.make(
                        recorder, tensor.shape, tensor.dtype, cell=ArrayCell(recorder.engine, array, None)
                    )
        if plain and by_input:
            heads = [tensor for tensor, _ in by_input]
            seeds = [fetch(recorder.engine, array) for _, array in by_input]
            gradients = torch.autograd.grad(heads, plain, seeds, retain_graph=retain_graph, allow_unused=True)
            found.update({id(tensor): gradient for tensor, gradient in zip(plain, gradients, strict=True)})

    recorder.engine.run_forward(loss_call(recorder, loss, retain_graph=retain_graph, keep=keep))
    return [found.get(id(tensor)) for tensor in wanted]


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` where an output or an input is a value of a prepared model."""
    from .dispatch import weighted_sum

    if create_graph or is_grads_batched:
        option = "create_graph" if create_graph else "is_grads_batched"
        raise UnsupportedError(f"torch.autograd.grad({option}=True) on values that a prepared model computed", _INSIDE)
    wanted = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    total = weighted_sum(outputs, grad_outputs)
    if not isinstance(total, DeviceTensor) or (total._ref is None and not total._is_spent):
        raise UnsupportedError("torch.autograd.grad on a value that was computed outside of the recorded loop", _INSIDE)
    found = total._recorder.gradients(total, wanted, retain_graph=bool(retain_graph))
    if materialize_grads:
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    elif not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError(_UNUSED)
    return tuple(found)
