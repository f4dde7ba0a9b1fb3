"""What the partitioner is told inside a model whose parameters are cut: weights whole over `fsdp` where a layer computes, batches by rows.

Without a word it may cut activations as the parameters lie, and compute parts of a layer on several devices. No number depends on this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyaccel.sharding.rules import Spec
from polyaccel_xla.mesh import DeviceMesh, Part


class LayerConstraints:
    """Hooks around one layer's forward pass.

    Inside it, parameters are copies that are cut over `tensor` at most: their gather is the copy's, and its gradient is summed up and
    cut again. What comes out is cut by rows if its first dim is that of the batch, or of the batch and dims after it.
    """

    def __init__(self, mesh: DeviceMesh, specs: Mapping[str, Spec], features: Part | bool) -> None:
        self._mesh = mesh
        self._features = features  # what cuts the last dim of the output; False: nothing is said of the output
        self._specs = {
            name: tuple(None if axis == "fsdp" else axis for axis in spec)
            for name, spec in specs.items()
            if "fsdp" in spec
        }
        self._kept: list[
            dict[str, torch.nn.Parameter | None]
        ] = []  # an entry per running call: a layer may call itself

    def enter(self, layer: torch.nn.Module, arguments: Any) -> None:
        """Before the forward pass."""
        slots: dict[str, Any] = layer._parameters
        kept = {name: slots.get(name) for name in self._specs}
        self._kept.append(kept)
        for name, parameter in kept.items():
            if parameter is not None and parameter.device.type == "xla":
                slots[name] = whole = parameter.clone()
                self._mesh.constrain(whole, self._specs[name])

    def leave(self, layer: torch.nn.Module, arguments: Any, outputs: Any) -> Any:
        """After the forward pass, and after an exception in it."""
        if self._kept:
            layer._parameters.update(self._kept.pop())
        if self._features is False or not isinstance(outputs, torch.Tensor) or outputs.device.type != "xla":
            return None
        if not self._mesh.is_of_batch(outputs.shape):
            return None
        middle = [None] * (outputs.dim() - 2)
        spec = (self._mesh.rows, *middle, self._features) if outputs.dim() > 1 else (self._mesh.rows,)
        return _Constrained.apply(outputs, self._mesh, spec)


class _Constrained(torch.autograd.Function):
    """A value and its gradient that lie in the same way."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, mesh: DeviceMesh, spec: Sequence[Part]) -> torch.Tensor:
        ctx.mesh, ctx.spec = mesh, spec
        copy = value.clone()
        mesh.constrain(copy, spec)
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        copy = gradients[0].clone()
        ctx.mesh.constrain(copy, ctx.spec)
        return copy, None, None


def constrain(module: torch.nn.Module, mesh: DeviceMesh, specs: Mapping[str, Spec]) -> None:
    """Install the hooks on every layer that has parameters of its own; those of an earlier mesh go."""
    by_parameter = {id(parameter): specs[name] for name, parameter in module.named_parameters()}
    for layer in module.modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), LayerConstraints):
                    del hooks[key]
                    layer._forward_hooks_always_called.pop(key, None)
        own = {name: by_parameter[id(p)] for name, p in layer.named_parameters(recurse=False)}
        if own and mesh.cuts_parameters:
            constraints = LayerConstraints(mesh, own, _features(layer, mesh, own))
            layer.register_forward_pre_hook(constraints.enter)
            layer.register_forward_hook(constraints.leave, always_call=True)


def _features(layer: torch.nn.Module, mesh: DeviceMesh, own: Mapping[str, Spec]) -> Part | bool:
    """What cuts the last dim of a layer's output; False where that is not known."""
    if mesh.sizes["tensor"] == 1:
        return None
    weight = own.get("weight", ())
    if "tensor" not in weight or len(weight) != 2:
        return False
    if isinstance(layer, torch.nn.Linear):  # (out, in)
        return weight[0] if weight[0] == "tensor" else None
    if isinstance(layer, torch.nn.Embedding):  # (rows, features)
        return weight[1] if weight[1] == "tensor" else None
    return False
