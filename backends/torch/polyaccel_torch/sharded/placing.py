"""A model brought onto a mesh: block after block gets process 0's values, or computes them, and is cut before the next one comes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.sharding.plan import plan_shardings
from polyaccel.sharding.rules import ShardingRule, first_match
from polyaccel_torch.dialect.late_values import LateValues
from polyaccel_torch.dialect.sharding_hints import hints_of
from polyaccel_torch.sharded import fsdp, repeated
from polyaccel_torch.sharded.mesh import ShardedMesh, settle
from polyaccel_torch.sharded.pieces import piece_of
from polyaccel_torch.sharded.sequence import cut_sequences, keep_whole
from polyaccel_torch.sharded.tensor import Specs, split_layers, splittable
from polyaccel_torch.sharded.units import units_of

if TYPE_CHECKING:
    from polyaccel.plan import Plan


class Placing:
    """Cuts models over one mesh, and remembers by which names their parameters are to be found afterwards: they are other objects."""

    def __init__(self, mesh: ShardedMesh, plan: Plan, device: torch.device) -> None:
        self.mesh = mesh
        self._precision = plan.precision
        self._rules: tuple[ShardingRule, ...] = plan.sharding_rules
        self._device = device
        self._is_offloaded = plan.offload == "cpu"
        self._moved: Any = WeakIdKeyDictionary()  # a parameter of before -> (its model, weakly, and its name there)

    def place(self, model: nn.Module) -> None:
        """Cut a model in place. Every process must call it.

        Process 0's values count. A model on the meta device gets them from its layers' `reset_parameters()`; no process ever holds
        more of it than one block, and what belongs to none. Raises, before anything is changed, PrepareError for what cannot be cut, and
        PlanError or UnsupportedError for a sharding rule that cannot be carried out, and for dtypes that cannot be averaged apart.
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
        kept = {id(parameter) for name, parameter in before.items() if self._stays_whole(name)}
        units = (
            units_of(model, blocks, lambda parameter: id(parameter) not in kept) if self.mesh.data is not None else {}
        )
        open_block = ""
        for name, slots in _tensors(model):
            block = next((path for path in blocks if name.startswith(f"{path}.")), "")
            if open_block not in ("", block):
                self._cut(model, open_block, specs, before, units)
            open_block = block
            self._fill(slots, late[name])
        if open_block:
            self._cut(model, open_block, specs, before, units)
        self._cut(model, "", specs, before, units)
        saved = model.state_dict(keep_vars=True)
        if followed := tuple(name for name, _ in model.named_buffers() if name in saved):
            model.register_forward_pre_hook(functools.partial(_follow_first, followed))
        if self.mesh.data is not None:
            fsdp.complete(model)
        if self.mesh.sequence is not None:
            cut_sequences(model, self.mesh.sequence)
        self._share_generators()

    def _specs(self, model: nn.Module) -> Specs:
        """How each parameter is cut. Raises PlanError or UnsupportedError for a rule of the script that cannot be carried out."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        asked = plan_shardings(shapes, self.mesh.sizes, self._rules, hints_of(model))
        specs, whole = splittable(model, asked.specs)
        size = self.mesh.sizes["tensor"]
        for name, why in whole.items():
            rule = first_match(self._rules, name)
            if rule is not None:
                raise UnsupportedError(
                    f"sharding rule {str(rule)!r} cuts parameter {name} of {type(model).__name__} over mesh.tensor={size}, and torch"
                    f" cannot: {why}",
                    "give such parameters a rule of their own without 'tensor'",
                )
        plan = replace(asked, specs=specs, indivisible={**asked.indivisible, **whole})
        if size > 1 and not any("tensor" in spec for spec in specs.values()):
            found = "; ".join(f"{name}: {why}" for name, why in list(plan.indivisible.items())[:3])
            raise PrepareError(
                f"mesh.tensor={size} splits no layer of {type(model).__name__}" + (f" ({found})" if found else ""),
                "say how by sharding_rules=[ShardingRule('*.fc1.weight', ('tensor', None)), ...], or use mesh.fsdp for this model",
            )
        if not any(self.mesh.coordinate.values()):
            plan.say(type(model).__name__, self.mesh.sizes)
        return specs

    def _stays_whole(self, name: str) -> bool:
        """Whether a rule of the script keeps a parameter whole; of its own accord FSDP2 cuts all of them, along dim 0."""
        rule = first_match(self._rules, name) if self.mesh.sizes["fsdp"] > 1 else None
        return rule is not None and rule.axes is None

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
        """What is whole on all processes of the tensor and sequence axes has to stay the same there, dropout of it too: they draw as
        one."""
        for axis in ("tensor", "sequence"):
            if self.mesh.sizes[axis] == 1:
                continue
            group = self.mesh.group(axis)
            first = dist.get_global_rank(group, 0)
            state = torch.get_rng_state().to(self._device)
            dist.broadcast(state, first, group=group)
            torch.set_rng_state(state.cpu())
            if self._device.type == "cuda":
                state = torch.cuda.get_rng_state(self._device).to(self._device)
                dist.broadcast(state, first, group=group)
                torch.cuda.set_rng_state(state.cpu(), self._device)

    def _cut(
        self,
        model: nn.Module,
        path: str,
        specs: Specs,
        before: dict[str, nn.Parameter],
        units: dict[str, list[nn.Module]],
    ) -> None:
        part, prefix = model.get_submodule(path), f"{path}." if path else ""
        # Of the model itself, what no block has taken: the blocks hold DTensors by now.
        own = {
            name: specs[prefix + name]
            for name, parameter in part.named_parameters()
            if prefix + name in specs and not isinstance(parameter, DTensor)
        }
        if self.mesh.tensor is not None:
            split_layers(part, self.mesh.tensor, {id(part.get_parameter(name)): spec for name, spec in own.items()})
        if self.mesh.sequence is not None:
            rest = [name for name in own if not isinstance(part.get_parameter(name), DTensor)]
            keep_whole(part, self.mesh.sequence, rest)
        if self.mesh.data is not None:
            by_id = {id(parameter): own[name] for name, parameter in part.named_parameters() if name in own}
            placement = fsdp.placement_of(by_id, self.mesh.sizes["fsdp"])
            whole = {part.get_parameter(name) for name in own if self._stays_whole(prefix + name)}
            if part is model:
                whole = {parameter for name, parameter in model.named_parameters() if self._stays_whole(name)}
            for unit in (*units[path], part):
                fsdp.shard(unit, self.mesh.data, self._precision, placement, whole, is_offloaded=self._is_offloaded)
            if part is model and whole:
                groups = [self.mesh.group(axis) for axis in ("replicas", "fsdp") if self.mesh.sizes[axis] > 1]
                repeated.of_model[model] = repeated.RepeatedGradients(list(whole), groups)
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
        if self.mesh.sequence is not None:
            optimizer.register_step_pre_hook(_settle_all)
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


def _settle_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before an update, gradients of parts of sequences are added up, once: else every operation of it would."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                settle(parameter)


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
