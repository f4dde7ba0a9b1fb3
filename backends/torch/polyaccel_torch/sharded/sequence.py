"""The mesh axis `sequence`: a model's inputs are cut along their sequences as DTensors, and what it returns is whole again.

Inside, all parameters are DTensors that each process of the axis has whole: torch knows of every activation which part of it lies here,
positions and lengths are those of the whole sequence, and an operation that needs more than a part gathers it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from polyaccel import trees
from polyaccel.errors import UnsupportedError
from polyaccel_torch.sharded.layouts import whole
from polyaccel_torch.sharded.sequence_rules import know_sequences
from polyaccel_torch.sharded.sequence_writes import RefuseLostWrites
from polyaccel_torch.sharded.tensor import let_plain_tensors_be_whole

LENGTH = 1  # the dim of inputs (batch, length, ...)


def keep_whole(part: nn.Module, mesh: DeviceMesh, names: list[str]) -> None:
    """Make these parameters of a module DTensors that every process of the mesh has whole, in place. Ties stay.

    Parameters must be the same on all processes of the mesh, or on the meta device.
    """
    made: dict[int, nn.Parameter] = {}
    wanted = {id(part.get_parameter(name)) for name in names}
    for module in part.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) not in wanted:
                continue
            if id(parameter) not in made:
                piece = distribute_tensor(parameter.detach(), mesh, whole(mesh), src_data_rank=None)
                made[id(parameter)] = nn.Parameter(piece, requires_grad=parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]


def cut_sequences(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on a call of the model computes this process's part of every sequence, and returns all of what it gives.

    Inputs are the same on all processes of the mesh. Raises UnsupportedError, while gradients are computed, for a call without
    sequences and for lengths that do not divide; without gradients such a call is computed whole by every process.
    """
    know_sequences(mesh.device_type)
    entering = _Enter(mesh)
    model.register_forward_pre_hook(entering, with_kwargs=True)
    # Nearest to the model, so that all other hooks meet whole tensors.
    model.register_forward_hook(_Leave(entering), prepend=True, always_call=True)


class _Enter:
    """Forward pre-hook. One mode per running call: a module may call itself."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self.running: list[RefuseLostWrites] = []

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        let_plain_tensors_be_whole()
        inputs = _in_parts(self._mesh, model, args, kwargs)
        mode = RefuseLostWrites()
        mode.__enter__()
        self.running.append(mode)
        return inputs


class _Leave:
    """Forward hook, called after an exception too."""

    def __init__(self, entered: _Enter) -> None:
        self._entered = entered

    def __call__(self, model: nn.Module, args: Any, outputs: Any) -> Any:
        if self._entered.running:  # else the call was refused
            self._entered.running.pop().__exit__(None, None, None)
        return _gathered(outputs) if isinstance(outputs, torch.Tensor) else trees.map_leaves(_gathered, outputs)


def _in_parts(mesh: DeviceMesh, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    leaves, structure = trees.flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor)]
    sequences = _sequences(tensors)
    size = mesh.size(-1)
    why = None
    if not sequences:
        why = "none of its inputs is a tensor (batch, length, ...)"
    elif sequences[0].shape[LENGTH] % size:
        why = f"its sequences have length {sequences[0].shape[LENGTH]}, which does not divide"
    if why is not None and torch.is_grad_enabled() and model.training:
        raise UnsupportedError(
            f"{type(model).__name__} was called with mesh.sequence={size}, and {why}",
            "pad sequences to a multiple of mesh.sequence, or leave mesh.sequence at 1 for this model",
        )
    # Inference mode keeps no record of views, by which a lost write is known.
    is_whole = why is not None or torch.is_inference_mode_enabled()
    cut = set() if is_whole else {id(tensor) for tensor in sequences}

    def laid_out(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, DTensor):
            return leaf
        given = DTensor.from_local(leaf, mesh, whole(mesh), run_check=False)
        if id(leaf) not in cut:
            return given
        return given.redistribute(placements=[*whole(mesh)[:-1], Shard(LENGTH)])

    args, kwargs = structure.unflatten(map(laid_out, leaves))
    return args, kwargs


def _sequences(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those with sequences: (batch, length, ...) as the first integer tensor of two dims or more has them, else as the first other one."""
    candidates = [tensor for tensor in tensors if tensor.dim() > 1]
    integers = [tensor for tensor in candidates if not tensor.is_floating_point() and tensor.dtype != torch.bool]
    first = next(iter([*integers, *candidates]), None)
    if first is None:
        return []
    return [tensor for tensor in candidates if tensor.shape[: LENGTH + 1] == first.shape[: LENGTH + 1]]


def _gathered(leaf: Any) -> Any:
    return _Gathered.apply(leaf) if isinstance(leaf, DTensor) else leaf


class _Gathered(torch.autograd.Function):
    """A DTensor as a whole plain tensor. `to_local` would give a view, on which FSDP2 loses its hooks when user code writes to it."""

    @staticmethod
    def forward(ctx: Any, pieces: Any) -> torch.Tensor:
        ctx.mesh, ctx.placements = pieces.device_mesh, pieces.placements
        return pieces.redistribute(placements=whole(ctx.mesh)).to_local()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        # What was in summands has the whole gradient for each of them.
        placements = [place if isinstance(place, Shard) else Replicate() for place in ctx.placements]
        return DTensor.from_local(grad, ctx.mesh, whole(ctx.mesh), run_check=False).redistribute(placements=placements)
