"""torch's forward hooks that bring a module's weights and inputs to the device that computes, and drop the weights afterwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from polyaccel import trees
from polyaccel.errors import PrepareError
from polyaccel_torch.big_models.tensors import Place, like, place_in_model
from polyaccel_torch.big_models.weights import OpenFiles, Source


@dataclass(slots=True)
class _Call:
    """A running forward: where its inputs came from, and what it found in the place of each weight that it brought in."""

    device: torch.device | None
    brought: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)


class WeightsHook:
    """On one module: `sources` are its tensors that are away, by their name inside it ("weight", "child.bias").

    Without a `device`, inputs stay where they are, and weights come in where their source has them.
    """

    def __init__(
        self,
        device: torch.device | None,
        sources: Mapping[str, Source],
        *,
        full_name: str = "",
        returns_to_caller: bool = False,
        skip_keys: Collection[str] = (),
    ) -> None:
        self.device = device
        self.sources = dict(sources)
        self._full_name = full_name
        self._returns_to_caller = returns_to_caller
        self._skip = frozenset(skip_keys)
        self._calls: list[_Call] = []

    def attach(self, module: nn.Module) -> None:
        """Run around every call of the module from now on; leaving also after an exception."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook."""
        call = _Call(_device_of((args, kwargs)) if self._returns_to_caller else None)
        self._calls.append(call)
        if self.sources and len(self._calls) == 1:  # a module that calls itself has its weights already
            self._bring_in(module, call)
        return move(args, self.device), move(kwargs, self.device, self._skip)

    def leave(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        """Forward hook."""
        if not self._calls:
            return outputs  # another hook failed before `enter` ran
        call = self._calls.pop()
        for name, (away, brought, version) in call.brought.items():
            place = place_in_model(module, name)
            now = place.tensor
            place.put(away)
            self.sources[name].forget()
            if now is not brought or _version(now) != version or self._is_rewritten(place, name, now):
                with torch.inference_mode(False), torch.no_grad():
                    self.sources[name].write_back(now)
        if call.device is not None:
            return move(outputs, call.device, self._skip)
        return outputs

    def restore(self, module: nn.Module, moved: dict[Source, torch.Tensor]) -> None:
        """Give the module its weights back, on the CPU; `moved` shares tied ones between modules."""
        with OpenFiles() as files:
            for name, source in self.sources.items():
                place = place_in_model(module, name)
                if source not in moved:
                    value = source.read(torch.device("cpu"), place.tensor.dtype, files)
                    moved[source] = like(place.tensor, value.clone())
                place.put(moved[source])

    def _is_rewritten(self, place: Place, name: str, now: torch.Tensor) -> bool:
        """Normalization layers write their statistics in training, and torch counts no version for it."""
        if not (place.is_buffer and place.module.training):
            return False
        with OpenFiles() as files:
            return not torch.equal(now, self.sources[name].read(now.device, now.dtype, files))

    def _bring_in(self, module: nn.Module, call: _Call) -> None:
        # Inference tensors count no versions, and a write could not be noticed.
        with OpenFiles() as files, torch.inference_mode(False), torch.no_grad():
            for name, source in self.sources.items():
                place = place_in_model(module, name)
                away = place.tensor
                value = source.live(self.device)
                if value is None or value.dtype != away.dtype:
                    value = like(away, source.read(self.device, away.dtype, files))
                    if value.requires_grad:
                        value.register_hook(_Refusal(f"{self._full_name}.{name}".lstrip(".")))
                    source.remember(value)
                place.put(value)
                call.brought[name] = (away, value, _version(value))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors count none


class _Refusal:
    """Gradient hook of a weight that is dropped after its forward."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, gradient: torch.Tensor) -> None:
        raise PrepareError(
            f"backward computed a gradient of {self._name}, which is offloaded: it is dropped after each forward",
            "freeze offloaded weights with requires_grad_(False), or give their modules a device of their own in device_map",
        )


def hooks_of(module: nn.Module) -> list[WeightsHook]:
    """Those on this module itself."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, WeightsHook)]


def detach_hooks(module: nn.Module) -> None:
    """Take them off; weights stay where they are."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for handle, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), WeightsHook):
                del hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
                module._forward_hooks_always_called.pop(handle, None)


def move(values: Any, device: torch.device | None, skip: Collection[str] = ()) -> Any:
    """Nested values with their tensors on `device` (None: where they are), except under the keys `skip` of the outermost mapping."""
    if device is None or all(_is_there(leaf, device) for leaf in trees.flatten(values)[0]):
        return values
    moved = trees.map_leaves(lambda leaf: _moved(leaf, device), values)
    if skip and isinstance(values, Mapping):
        for key in skip & values.keys():
            moved[key] = values[key]
    return moved


def _is_there(leaf: Any, device: torch.device) -> bool:
    if isinstance(leaf, torch.Tensor):
        return leaf.device == device
    return not hasattr(leaf, "to") or isinstance(leaf, nn.Module)


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf if _is_there(leaf, device) else leaf.to(device)


def _device_of(values: Any) -> torch.device | None:
    return next((leaf.device for leaf in trees.flatten(values)[0] if isinstance(leaf, torch.Tensor)), None)
