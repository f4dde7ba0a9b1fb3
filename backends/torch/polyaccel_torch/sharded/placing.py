"""A model brought onto a mesh: block after block gets process 0's values, or computes them, and is cut before the next one comes."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from polyaccel.errors import PrepareError
from polyaccel.precision import PrecisionPolicy
from polyaccel_torch.dialect.late_values import LateValues
from polyaccel_torch.sharded import fsdp
from polyaccel_torch.sharded.mesh import ShardedMesh
from polyaccel_torch.sharded.pieces import piece_of
from polyaccel_torch.sharded.specs import INPUTS_CUT, OUTPUTS_CUT, Specs, specs_of
from polyaccel_torch.sharded.tensor import split_layers, splittable

log = logging.getLogger("polyaccel.torch")


class Placing:
    """Cuts models over one mesh, and remembers by which names their parameters are to be found afterwards: they are other objects."""

    def __init__(self, mesh: ShardedMesh, precision: PrecisionPolicy, device: torch.device) -> None:
        self.mesh = mesh
        self._precision = precision
        self._device = device
        self._moved: Any = WeakIdKeyDictionary()  # a parameter of before -> (its model, weakly, and its name there)

    def place(self, model: nn.Module) -> None:
        """Cut a model in place. Every process must call it.

        Process 0's values count. A model on the meta device gets them from its layers' `reset_parameters()`; no process ever holds
        more of it than one block, and what belongs to none. Raises PrepareError, before anything is changed, for what cannot be cut.
        """
        before = dict(model.named_parameters())
        for name, parameter in before.items():
            if isinstance(parameter, DTensor):
                raise PrepareError(
                    f"{type(model).__name__}.{name} is a DTensor already",
                    "prepare the model before it is cut: prepare cuts it",
                )
        specs = self._specs(model)
        late = LateValues(model, {**before, **dict(model.named_buffers())})
        blocks = fsdp.blocks_of(model)
        open_block = ""
        for name, slots in _tensors(model):
            block = next((path for path in blocks if name.startswith(f"{path}.")), "")
            if open_block not in ("", block):
                self._cut(model, blocks[open_block], open_block, specs, before)
            open_block = block
            self._fill(slots, late[name])
        if open_block:
            self._cut(model, blocks[open_block], open_block, specs, before)
        self._cut(model, model, "", specs, before)
        saved = model.state_dict(keep_vars=True)
        if kept := tuple(name for name, _ in model.named_buffers() if name in saved):
            model.register_forward_pre_hook(functools.partial(_follow_first, kept))
        if self.mesh.tensor is not None:
            self._share_generators()

    def _specs(self, model: nn.Module) -> Specs:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        asked, uneven = specs_of(shapes, self.mesh.sizes)
        specs, unsplittable = splittable(model, asked)
        size = self.mesh.sizes["tensor"]
        if size > 1 and not any("tensor" in spec for spec in specs.values()):
            raise PrepareError(
                f"mesh.tensor={size} splits no layer of {type(model).__name__}:"
                + (
                    f" {', '.join(uneven[:3])} cannot be cut into {size} equal parts" if uneven else " no name is known"
                ),
                f"use mesh.fsdp for this model; known are Linear layers named {', '.join((*OUTPUTS_CUT, *INPUTS_CUT))}",
            )
        for names, why in (
            (uneven, "do not divide"),
            (unsplittable, "are shared, or of no layer that torch can split"),
        ):
            if names:
                log.warning(
                    "%s: whole along mesh.tensor=%d, as they %s: %s", type(model).__name__, size, why, ", ".join(names)
                )
        return specs

    def _fill(self, slots: list[tuple[nn.Module, str]], value: torch.Tensor) -> None:
        part, key = slots[0]
        old = part._parameters.get(key)
        shared = self._from_first(value)
        if old is None:
            for part, key in slots:
                part._buffers[key] = shared
        elif old.is_meta:
            new = nn.Parameter(shared, requires_grad=old.requires_grad)
            for part, key in slots:
                part._parameters[key] = new
        else:
            old.data = shared

    def _from_first(self, value: torch.Tensor) -> torch.Tensor:
        """Process 0's value on this process's device: the processes need not have drawn the same."""
        shared = value.detach().to(self._device).contiguous()
        dist.broadcast(shared.view(torch.uint8) if shared.dtype == torch.bool else shared, 0)
        return shared

    def _share_generators(self) -> None:
        """What is whole on all processes of the tensor axis has to stay the same there, dropout of it too: they draw as one."""
        group = self.mesh.group("tensor")
        first = dist.get_global_rank(group, 0)
        state = torch.get_rng_state().to(self._device)
        dist.broadcast(state, first, group=group)
        torch.set_rng_state(state.cpu())
        if self._device.type == "cuda":
            state = torch.cuda.get_rng_state(self._device).to(self._device)
            dist.broadcast(state, first, group=group)
            torch.cuda.set_rng_state(state.cpu(), self._device)

    def _cut(self, model: nn.Module, part: nn.Module, path: str, specs: Specs, before: dict[str, nn.Parameter]) -> None:
        prefix = f"{path}." if path else ""
        # Of the model itself, what no block has taken: the blocks hold DTensors by now.
        own = {
            name: specs[prefix + name]
            for name, parameter in part.named_parameters()
            if prefix + name in specs and not isinstance(parameter, DTensor)
        }
        if self.mesh.tensor is not None:
            split_layers(part, self.mesh.tensor, own)
        if self.mesh.data is not None:
            by_id = {id(parameter): own[name] for name, parameter in part.named_parameters() if name in own}
            fsdp.shard(part, self.mesh.data, self._precision, fsdp.placement_of(by_id, self.mesh.sizes["fsdp"]))
        for name in own:
            old, new = before[prefix + name], part.get_parameter(name)
            if new is not old:
                self._moved[old] = (weakref.ref(model), prefix + name)
                if not old.is_meta:
                    old.data = old.data.new_empty(0)  # an optimizer still holds it, and would hold all of it

    # -- optimizers ----------------------------------------------------------------------------------------------------

    def adopt(self, optimizer: Optimizer) -> None:
        """Let an optimizer that was made before its model was cut update the pieces; its state is cut with them."""
        for group in optimizer.param_groups:
            group["params"][:] = [self._now(parameter) for parameter in group["params"]]
        for old in list(optimizer.state):
            new = self._now(old)
            if new is not old:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {
                    slot: piece_of(value, new)
                    if isinstance(value, torch.Tensor) and value.shape == new.shape
                    else value
                    for slot, value in state.items()
                }
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len({getattr(parameter, "device_mesh", None) for parameter in parameters}) > 1:
            for group in optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = False  # one kernel for tensors of several meshes is refused by torch

    def _now(self, parameter: Any) -> Any:
        found = self._moved.get(parameter)
        model = None if found is None else found[0]()
        return parameter if model is None else model.get_parameter(found[1])


@torch.no_grad()
def _follow_first(names: tuple[str, ...], model: nn.Module, arguments: Any) -> None:
    """Before a forward, buffers that are saved (running statistics) become process 0's, as in DistributedDataParallel."""
    buffers = [model.get_buffer(name) for name in names]
    sent = [buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer for buffer in buffers]
    for exchange in [dist.broadcast(buffer, 0, async_op=True) for buffer in sent]:
        if exchange is not None:
            exchange.wait()


def _tensors(model: nn.Module) -> Iterator[tuple[str, list[tuple[nn.Module, str]]]]:
    """Parameters and buffers by their first name, with all places that hold them, part after part."""
    places: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for path, part in model.named_modules():
        for slots in (part._parameters, part._buffers):
            for key, tensor in slots.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    places.setdefault(id(tensor), (name, []))[1].append((part, key))
    yield from list(places.values())
