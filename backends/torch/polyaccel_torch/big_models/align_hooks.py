"""Module hooks that bring inputs and weights to the device that computes, for one module at a time, and their attachment to many.

What `dispatch_model` does for a whole model with a device map, these do by hand; the weights may come from any mapping of names to tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel.errors import PrepareError
from polyaccel_torch.big_models.hooks import WeightsHook, detach_hooks, hooks_of
from polyaccel_torch.big_models.module_hooks import (
    ModelHook,
    add_hook_to_module,
    hooks_on,
    remove_hook_from_module,
)
from polyaccel_torch.big_models.sizes import class_names
from polyaccel_torch.big_models.tensors import Place, direct_places, join, like, place_in_model, places, resolve_device
from polyaccel_torch.big_models.weight_maps import PrefixedDataset
from polyaccel_torch.big_models.weights import OpenFiles, Source

TiedTensors = dict[int, dict[Any, torch.Tensor]]


class MappedSource(Source):
    """A weight that a mapping gives, anew at every read. `tied`: what is on devices already, by the address of the mapping's tensor."""

    def __init__(self, weights: Mapping[str, torch.Tensor], name: str, tied: TiedTensors | None) -> None:
        super().__init__()
        self._weights = weights
        self._name = name
        self._tied = tied
        self._written: torch.Tensor | None = None
        self._registered: tuple[int, torch.device] | None = None

    def live(self, device: torch.device | None) -> torch.Tensor | None:
        """What this or another hook has there."""
        found = super().live(device)
        if found is None and self._tied is not None and self._written is None:
            found = self._tied.get(self._weights[self._name].data_ptr(), {}).get(device)
        return found

    def remember(self, tensor: torch.Tensor) -> None:
        """Tell the others, where the caller's map knows the weight as tied."""
        super().remember(tensor)
        pointer = self._weights[self._name].data_ptr() if self._tied is not None else 0
        if self._tied is not None and pointer in self._tied:
            self._tied[pointer][tensor.device] = tensor
            self._registered = (pointer, tensor.device)

    def forget(self) -> None:
        """The others may not find it any more: it would stay on the device for them."""
        if self._tied is not None and self._registered is not None:
            pointer, device = self._registered
            self._tied.get(pointer, {}).pop(device, None)
            self._registered = None

    def read(self, device: torch.device | None, dtype: torch.dtype, files: OpenFiles) -> torch.Tensor:
        """Its values; what a forward wrote counts."""
        value = self._weights[self._name] if self._written is None else self._written
        return value.detach().to(device, dtype, copy=self._written is not None)

    def write_back(self, value: torch.Tensor) -> None:
        """Kept here: the mapping is the caller's, and may be a file."""
        self._written = value.detach().to("cpu", copy=True)


class AlignDevicesHook(ModelHook):
    """Inputs, and weights with `offload`, are on `execution_device` for the forward; weights leave after it.

    Args:
        execution_device: None: inputs stay where they are.
        offload: weights are on the meta device between forwards.
        io_same_device: outputs come back to the device of the inputs.
        weights_map: the weights by their name inside the module, which may be read lazily; None: those that the module has, on the CPU.
        offload_buffers: buffers leave too (those that are in the state dict).
        place_submodules: the same for the weights of the modules inside.
        skip_keys: keyword arguments and keys of outputs that are not moved.
        tied_params_map: {address of a tied weight: {device: the tensor there}}, shared by the hooks of a model: a weight is there once.

    A backward that needs the gradient of an offloaded weight raises PrepareError: the gradient would go with the weight.
    """

    def __init__(
        self,
        execution_device: int | str | torch.device | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, torch.Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | Collection[str] | None = None,
        tied_params_map: TiedTensors | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = skip_keys
        self.tied_params_map = tied_params_map
        self.original_devices: dict[str, torch.device] = {}
        self.weights = WeightsHook(None, {}, returns_to_caller=io_same_device, skip_keys=class_names(skip_keys))

    def __repr__(self) -> str:
        names = ("execution_device", "offload", "io_same_device", "offload_buffers", "place_submodules", "skip_keys")
        return f"AlignDevicesHook({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Weights go to the device, or away."""
        held = places(module) if self.place_submodules else {place.name: place for place in direct_places(module)}
        self.original_devices = {name: place.tensor.device for name, place in held.items()}
        device = self._device()
        away: dict[str, Place] = {}
        if self.offload:
            away = {n: p for n, p in held.items() if p.is_stored and (self.offload_buffers or not p.is_buffer)}
            self._send_away(away)
        if device is not None:
            for name, place in held.items():
                if name not in away:
                    put_on(place, device, self.tied_params_map)
        return module

    def _send_away(self, away: Mapping[str, Place]) -> None:
        if self.weights_map is None:
            for name, place in away.items():
                if place.tensor.is_meta:
                    raise PrepareError(
                        f"{name} has no values: it is on the meta device",
                        "give weights_map=, or load a checkpoint first",
                    )
            self.weights_map = {name: place.tensor.detach().to("cpu") for name, place in away.items()}
        sources: dict[int, MappedSource] = {}
        absent: dict[int, torch.Tensor] = {}
        for name, place in away.items():
            old = place.tensor
            if name not in self.weights_map:
                raise PrepareError(f"weights_map has no {name!r}", "give a mapping with every weight of the module")
            # What is tied inside the module is one tensor there, too.
            key = id(old)
            if key not in sources:
                sources[key] = MappedSource(self.weights_map, name, self.tied_params_map)
                absent[key] = old if old.is_meta else like(old, torch.empty_like(old, device="meta"))
            self.weights.sources[name] = sources[key]
            place.put(absent[key])

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring in weights and inputs."""
        self.weights.device = self._device()
        try:
            return self.weights.enter(module, args, kwargs)
        except BaseException:
            self.forward_failed(module)
            raise

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Drop weights, return outputs."""
        return self.weights.leave(module, (), output)

    def forward_failed(self, module: nn.Module) -> None:
        """Drop weights."""
        self.weights.leave(module, (), None)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Weights that were away are where they were before the hook, unless they had no values there."""
        given: dict[Source, torch.Tensor] = {}
        with OpenFiles() as files:
            for name, source in self.weights.sources.items():
                device = self.original_devices[name]
                if device.type == "meta":
                    continue
                place = place_in_model(module, name)
                if source not in given:
                    given[source] = like(place.tensor, source.read(device, place.tensor.dtype, files))
                place.put(given[source])
        self.weights.sources.clear()
        return module

    def _device(self) -> torch.device | None:
        return None if self.execution_device is None else resolve_device(self.execution_device, "execution_device")


def put_on(place: Place, device: torch.device, tied: TiedTensors | None) -> None:
    """Move a tensor to a device, or hang there what a tied one is already."""
    old = place.tensor
    known = tied.get(old.data_ptr()) if tied is not None and not old.is_meta else None
    if known is not None and device in known:
        place.put(known[device])
        return
    if old.device == device:
        new = old
    elif old.is_meta:
        raise PrepareError(
            f"{place.name} has no values: it is on the meta device", "load a checkpoint that has it, or give it a value"
        )
    else:
        new = like(old, old.detach().to(device))
        place.put(new)
    if known is not None:
        known[device] = new


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: int | str | torch.device,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedTensors | None = None,
) -> None:
    """An `AlignDevicesHook` that moves weights and inputs, on every module with a state and without a hook, down to preloaded ones."""
    if not hooks_on(module) and module.state_dict():
        hook = AlignDevicesHook(execution_device, skip_keys=skip_keys, tied_params_map=tied_params_map)
        add_hook_to_module(module, hook)
    if type(module).__name__ in class_names(preload_module_classes):
        return
    for child in module.children():
        attach_execution_device_hook(child, execution_device, skip_keys, preload_module_classes, tied_params_map)


def attach_align_device_hook(
    module: nn.Module,
    execution_device: int | str | torch.device | None = None,
    offload: bool = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedTensors | None = None,
) -> None:
    """An `AlignDevicesHook` on every module that holds a tensor itself. `module_name`: of `module` in `weights_map`."""
    is_preloaded = offload and type(module).__name__ in class_names(preload_module_classes)
    if is_preloaded or any(True for _ in direct_places(module)):
        own = None if weights_map is None else PrefixedDataset(weights_map, f"{module_name}." if module_name else "")
        hook = AlignDevicesHook(
            execution_device,
            offload=offload,
            weights_map=own,
            offload_buffers=offload_buffers,
            place_submodules=is_preloaded,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
        )
        add_hook_to_module(module, hook, append=True)
    if is_preloaded:
        return
    for name, child in module.named_children():
        attach_align_device_hook(
            child,
            execution_device,
            offload,
            weights_map,
            offload_buffers,
            join(module_name, name),
            skip_keys,
            preload_module_classes,
            tied_params_map,
        )


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: int | str | torch.device | Mapping[str, int | str | torch.device] | None = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedTensors | None = None,
) -> None:
    """Hooks for blocks: a device, and whether weights leave, by module name, or one for all. Outputs of the whole come back."""
    devices: dict[str, Any] = {}
    leaving: Mapping[str, bool]
    if isinstance(execution_device, Mapping):
        devices.update(execution_device)
        leaving = offload if isinstance(offload, Mapping) else dict.fromkeys(devices, offload)
    else:
        leaving = offload if isinstance(offload, Mapping) else {module_name: offload}
        devices.update(dict.fromkeys(leaving, execution_device))
    device, is_root = devices.get(module_name), module_name == ""
    is_block = module_name in devices and module_name in leaving
    if is_block and leaving[module_name]:
        attach_align_device_hook(
            module,
            device,
            True,
            weights_map,
            offload_buffers,
            module_name,
            skip_keys,
            preload_module_classes,
            tied_params_map,
        )
        if not hooks_on(module):
            hook = AlignDevicesHook(
                device, io_same_device=is_root, skip_keys=skip_keys, tied_params_map=tied_params_map
            )
            add_hook_to_module(module, hook)
    elif is_block:
        hook = AlignDevicesHook(
            device,
            io_same_device=is_root,
            place_submodules=True,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
        )
        add_hook_to_module(module, hook)
    elif is_root:
        hook = AlignDevicesHook(device, io_same_device=True, skip_keys=skip_keys, tied_params_map=tied_params_map)
        add_hook_to_module(module, hook)
    if is_block and device is not None:
        attach_execution_device_hook(module, device, skip_keys, preload_module_classes, tied_params_map)
    for name, child in module.named_children():
        attach_align_device_hook_on_blocks(
            child,
            devices,
            leaving,
            weights_map,
            offload_buffers,
            join(module_name, name),
            skip_keys,
            preload_module_classes,
            tied_params_map,
        )


def weights_hooks(module: nn.Module) -> list[WeightsHook]:
    """What brings in this module's own weights, whoever attached it."""
    aligning = [hook.weights for hook in hooks_on(module) if isinstance(hook, AlignDevicesHook) and hook.offload]
    return [*(hook for hook in hooks_of(module) if hook.sources), *aligning]


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Undo `dispatch_model`, `cpu_offload` and `disk_offload`, and take off every module hook: weights that were away are back.

    Those of the first three are on the CPU; what a module hook took away is where it was before.
    """
    moved: dict[Source, torch.Tensor] = {}
    for part in module.modules():
        for hook in hooks_of(part):
            hook.restore(part, moved)
        detach_hooks(part)
        remove_hook_from_module(part)
    module.__dict__.pop("hf_device_map", None)
