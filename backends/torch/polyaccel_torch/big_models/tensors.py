"""A model's tensors by name: who holds them, which are tied, and how one is put in the place of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyaccel.errors import ConfigError, PlanError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor hangs: `module._parameters[name]`, or `module._buffers[name]`. `is_stored`: it is in `state_dict`."""

    module: nn.Module
    name: str
    is_buffer: bool
    is_stored: bool

    @property
    def tensor(self) -> torch.Tensor:
        """What hangs there now."""
        held: Any = self.module._buffers if self.is_buffer else self.module._parameters
        return held[self.name]

    def put(self, value: torch.Tensor) -> None:
        """Hang another one there, past torch's hooks on registration."""
        held: Any = self.module._buffers if self.is_buffer else self.module._parameters
        held[self.name] = value

    def fill(self, value: torch.Tensor) -> None:
        """Hang a value there, as what hangs there now is: with its class, attributes and requires_grad."""
        self.put(like(self.tensor, value))


def place_in_model(model: nn.Module, name: str) -> Place:
    """Where a full name hangs. Raises ConfigError for a name that the model has not."""
    owner, _, own = name.rpartition(".")
    try:
        holder = model.get_submodule(owner)
    except AttributeError as error:
        raise ConfigError(f"{type(model).__name__} has no {name!r}: {error}", "use a name of its state dict") from error
    if holder._parameters.get(own) is None and holder._buffers.get(own) is None:
        raise ConfigError(f"{type(model).__name__} has no parameter or buffer {name!r}", "use a name of its state dict")
    return Place(holder, own, is_buffer=own in holder._buffers, is_stored=own not in holder._non_persistent_buffers_set)


def direct_places(module: nn.Module) -> Iterator[Place]:
    """The module's own tensors, those of its children not."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(module, name, is_buffer=False, is_stored=True)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield Place(module, name, is_buffer=True, is_stored=name not in module._non_persistent_buffers_set)


def places(model: nn.Module) -> dict[str, Place]:
    """Every tensor by its full name; a tied one, or one of a module that hangs in two places, under each of its names."""
    return {
        join(prefix, place.name): place
        for prefix, module in model.named_modules(remove_duplicate=False)
        for place in direct_places(module)
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """Of every tensor's name, the first that the same tensor has: equal for what is tied."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(place.tensor), name) for name, place in places(model).items()}


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or the name alone."""
    return f"{prefix}.{name}" if prefix else name


def is_inside(name: str, module: str) -> bool:
    """Whether a full name is this module's, or the tensor of that name itself."""
    return not module or name == module or name.startswith(f"{module}.")


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one object, group by group, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def like(old: torch.Tensor, value: torch.Tensor) -> Any:
    """`value` as what `old` is: a parameter with its class, attributes and requires_grad, or a plain buffer."""
    if not isinstance(old, nn.Parameter):
        return value
    if type(old) is nn.Parameter:
        new: Any = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        new = value.detach().as_subclass(type(old)).requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`torch.float16` for "float16" and "torch.float16". Raises ConfigError for a name that torch has not."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is no dtype of torch", "use a name such as 'float16' or 'bfloat16'")
    return found


def resolve_device(device: Any, user: str) -> torch.device:
    """The device that an entry means; `user` is whose it is, for the error. Raises PlanError for one that is not here."""
    if device == "disk":
        raise ConfigError(f"{user} is 'disk', where nothing can be computed", "give a device, such as 0 or 'cpu'")
    try:
        wanted = torch.device(device) if not isinstance(device, int) else _accelerator(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{user} is {device!r}, which torch does not know: {error}", "use an index, 'cpu' or 'disk'"
        ) from error
    present = torch.accelerator.device_count()
    here = torch.accelerator.current_accelerator() if present else None
    if wanted.type in ("cpu", "meta"):
        return torch.device(wanted.type)  # without an index, as a tensor says it
    if here is None or wanted.type != here.type or (wanted.index or 0) >= present:
        found = f"{present} of type {here.type}" if here is not None else "none"
        raise PlanError(
            f"{user} is {device!r}, and this machine has no such device ({found})",
            "use a device that is here, or 'cpu'",
        )
    return torch.device(wanted.type, wanted.index or 0)


def _accelerator(index: int) -> torch.device:
    here = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
    return torch.device("cuda" if here is None else here.type, index)
