"""The parameter and buffer slots of modules: what fills them, which share a tensor, and how other tensors stand in for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from polyaccel.errors import PrepareError

from .containers import ContainerContents
from .graphs import TensorSpec
from .shared_objects import PlainValues
from .substitutes import substituted


@dataclass(frozen=True, slots=True)
class Place:
    """One slot: its dict, its key in there, and the name under which its tensor is kept."""

    holder: dict[str, Any]
    key: str
    name: str


@dataclass(slots=True)
class ModuleState:
    """Every parameter and buffer slot of the modules; tensors that fill several slots are kept under the first name."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    is_param: dict[str, bool] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    submodules: list[nn.Module] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[tuple[str, bool], ...]:
        return tuple(self.is_param.items())


def collect_state(modules: Mapping[str, nn.Module]) -> ModuleState:
    """The state of `modules`, names prefixed with their keys. Raises PrepareError for lazy modules."""
    state = ModuleState()
    first: dict[int, str] = {}
    for key, root in modules.items():
        for path, module in root.named_modules(prefix=key, remove_duplicate=False):
            is_new = id(module) not in state.paths
            if is_new:
                state.paths[id(module)] = path
                state.submodules.append(module)
            for holder, is_param in ((module._parameters, True), (module._buffers, False)):
                for slot, tensor in holder.items():
                    if tensor is None:
                        continue
                    full = f"{path}.{slot}"
                    if nn.parameter.is_lazy(tensor):
                        raise PrepareError(
                            f"{full} of the lazy module {type(module).__name__} has no shape yet",
                            "run the model once on a real batch before it is prepared",
                        )
                    name = first.setdefault(id(tensor), full)
                    if name != full:
                        state.tied[full] = name
                    else:
                        requires_grad = is_param and tensor.requires_grad
                        state.specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype, requires_grad)
                        state.is_param[name] = is_param
                    if is_new:
                        state.places.append(Place(holder, slot, name))
    return state


@contextlib.contextmanager
def filled(state: ModuleState, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The modules' slots hold `tensors`; afterwards they, and every attribute that the function set or filled, are as before."""
    containers = ContainerContents(state.submodules)
    shared = PlainValues([("", module) for module in state.submodules])
    attributes = [(module, dict(module.__dict__)) for module in state.submodules]
    holders = {id(place.holder): place.holder for place in state.places}
    for module in state.submodules:
        holders.update({id(holder): holder for holder in (module._parameters, module._buffers)})
    contents = [(holder, dict(holder)) for holder in holders.values()]
    try:
        for place in state.places:
            place.holder[place.key] = tensors[place.name]
        for module in state.submodules:
            if isinstance(module, nn.RNNBase):  # it hands these to the kernel and not its parameters
                module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in module._flat_weights_names]
        with substituted(state.submodules):
            yield
    finally:
        for holder, saved in contents:
            holder.clear()
            holder.update(saved)
        for module, attributes_before in attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes_before)
        containers.restore()
        shared.restore()
