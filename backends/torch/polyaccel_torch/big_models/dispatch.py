"""A model spread over devices, host memory and disk: each tensor is placed, or left away for a hook that brings it in."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel.errors import ConfigError, PrepareError
from polyaccel_torch.big_models.device_map import check_device_map, device_of
from polyaccel_torch.big_models.hooks import WeightsHook, hooks_of
from polyaccel_torch.big_models.sizes import Device, class_names
from polyaccel_torch.big_models.tensors import Place, direct_places, first_names, join, like, places, resolve_device
from polyaccel_torch.big_models.weights import (
    HostSource,
    OpenFiles,
    Source,
    add_to_index,
    entry_source,
    read_index,
    write_weight,
)

Folder = str | os.PathLike[str]
_ON_HOST = ("cpu", "mps")  # computing there, a weight in host memory is where it is needed


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: Folder | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """The same model, spread as the map says."""
    check_device_map(model, device_map)
    devices = list(dict.fromkeys(device_map.values()))
    if not devices:
        raise ConfigError("device_map is empty", "give at least {'': 'cpu'}")
    if len(devices) == 1 and devices != ["disk"] and not force_hooks:
        _place_whole(model, resolve_device(devices[0], "device_map"))
    else:
        if main_device is None:
            main_device = next((device for device in devices if device not in ("cpu", "disk")), "cpu")
        main = resolve_device(main_device, "main_device")
        away = {"disk"} if main.type in _ON_HOST else {"cpu", "disk"}
        resolved = {
            name: main if device in away else resolve_device(device, f"device_map[{name!r}]")
            for name, device in device_map.items()
        }
        stores = _Stores(model, state_dict, offload_dir, offload_index)

        def source(name: str, place: Place, executes: torch.device) -> Source | None:
            wanted = device_of(name, device_map)
            if wanted == "disk":
                return stores.on_disk(name, place)
            if wanted in away:
                return stores.on_host(name, place)
            # A parameter with an entry of its own may live on another device than the rest of its module.
            home = device_of(name, resolved)
            return None if home in (None, executes) else HostSource(_real(name, place).to(home))

        spread = _Spread(
            model,
            executes=lambda name: device_of(name, resolved) or main,
            source=source,
            entries=device_map,
            main=main,
            offload_buffers=offload_buffers,
            skip_keys=class_names(skip_keys),
            preload=class_names(preload_module_classes),
        )
        spread.run()
        stores.finish()
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def cpu_offload(
    model: nn.Module,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Collection[str] | None = None,
) -> nn.Module:
    """The same model; every weight is in host memory between forwards."""
    stores = _Stores(model, state_dict, None, None)
    _offload_all(
        model,
        execution_device,
        lambda name, place, _: stores.on_host(name, place),
        offload_buffers,
        preload_module_classes,
    )
    stores.finish()
    return model


def disk_offload(
    model: nn.Module,
    offload_dir: Folder,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Collection[str] | None = None,
) -> nn.Module:
    """The same model; every weight is in a safetensors file between forwards."""
    stores = _Stores(model, None, offload_dir, None)
    _offload_all(
        model,
        execution_device,
        lambda name, place, _: stores.on_disk(name, place),
        offload_buffers,
        preload_module_classes,
    )
    stores.finish()
    return model


def _offload_all(
    model: nn.Module,
    execution_device: Device | None,
    source: Callable[[str, Place, torch.device], Source | None],
    offload_buffers: bool,
    preload: Collection[str] | None,
) -> None:
    if execution_device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    else:
        device = resolve_device(execution_device, "execution_device")
    _Spread(
        model,
        executes=lambda name: device,
        source=source,
        entries={},
        main=device,
        offload_buffers=offload_buffers,
        skip_keys=(),
        preload=class_names(preload),
    ).run()


class _Stores:
    """Where weights that are away are kept: the host, files that an index names, or files that are written now."""

    def __init__(
        self,
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor] | None,
        folder: Folder | None,
        index: Mapping[str, Any] | None,
    ) -> None:
        self._firsts = first_names(model)
        self._host = dict(state_dict or {})
        self._folder = folder
        self._index = dict(index) if index is not None else read_index(folder) if folder is not None else {}
        self._written: dict[str, Any] = {}
        self._known: dict[str, Source] = {}  # by first name: tied ones share a source
        self._files = OpenFiles()

    def on_host(self, name: str, place: Place) -> Source:
        """In host memory: what the caller gave, else what the model holds, else what an index knows."""
        if name in self._host:
            return self._shared(name, lambda: HostSource(self._host[name].to("cpu")))
        if place.tensor.is_meta and name in self._index:
            return self._shared(name, lambda: self._look_up(name, place))
        return self._shared(name, lambda: HostSource(_real(name, place).to("cpu")))

    def on_disk(self, name: str, place: Place) -> Source:
        """On disk. What the model holds is written; what it has no values of is looked up."""
        return self._shared(name, lambda: (self._look_up if place.tensor.is_meta else self._write)(name, place))

    def finish(self) -> None:
        """Add what was written to the folder's index."""
        self._files.close()
        if self._written and self._folder is not None:
            add_to_index(self._folder, self._written)

    def _shared(self, name: str, make: Callable[[], Source]) -> Source:
        first = self._firsts[name]
        if first not in self._known:
            self._known[first] = make()
        return self._known[first]

    def _look_up(self, name: str, place: Place) -> Source:
        if name not in self._index:
            raise PrepareError(
                f"{name} has no values, and {self._where()} does not know it",
                "load the model with load_checkpoint_and_dispatch, which writes the index that is needed",
            )
        return entry_source(name, self._index[name], place.tensor.shape, self._files, self._folder)

    def _write(self, name: str, place: Place) -> Source:
        if self._folder is None:
            raise ConfigError(
                f"{name} is to be kept on disk, and no folder is given", "give offload_dir=, a folder on a fast disk"
            )
        self._written[name] = write_weight(self._folder, name, place.tensor)
        return entry_source(name, self._written[name], place.tensor.shape, self._files)

    def _where(self) -> str:
        return "the offload index" if self._folder is None else f"the index in {os.fspath(self._folder)}"


class _Spread:
    """One walk over the modules decides; then weights are placed or replaced by meta tensors, and hooks attached."""

    def __init__(
        self,
        model: nn.Module,
        *,
        executes: Callable[[str], torch.device],
        source: Callable[[str, Place, torch.device], Source | None],
        entries: Mapping[str, Device],
        main: torch.device,
        offload_buffers: bool,
        skip_keys: Collection[str],
        preload: frozenset[str],
    ) -> None:
        self._model = model
        self._executes = executes
        self._source = source
        self._entries = entries
        self._main = main
        self._buffers = offload_buffers
        self._skip = skip_keys
        self._preload = preload
        self._firsts = first_names(model)
        self._placed: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._changes: list[tuple[Place, torch.Tensor]] = []
        self._hooks: dict[int, tuple[nn.Module, WeightsHook]] = {}

    def run(self) -> None:
        """Place and hook the whole model. Raises before anything changes."""
        if any(hooks_of(part) for part in self._model.modules()):
            raise PrepareError(
                "the model is dispatched or offloaded already",
                "call remove_hook_from_submodules(model) first, which brings its weights back",
            )
        self._visit("", self._model)
        for place, tensor in self._changes:
            place.put(tensor)
        for module, hook in self._hooks.values():
            hook.attach(module)

    def _visit(self, name: str, module: nn.Module) -> None:
        if id(module) in self._hooks:
            return  # a module that hangs in two places
        device = self._main if not name else self._executes(name)
        is_preloaded = type(module).__name__ in self._preload
        sources: dict[str, Source] = {}
        has_tensors = False
        for inner, part in module.named_modules() if is_preloaded else [("", module)]:
            for place in direct_places(part):
                has_tensors = True
                local = join(inner, place.name)
                found = self._settle(join(name, local), place, device)
                if found is not None:
                    sources[local] = found
        if not name or name in self._entries or has_tensors:
            hook = WeightsHook(device, sources, full_name=name, returns_to_caller=not name, skip_keys=self._skip)
            self._hooks[id(module)] = (module, hook)
        if is_preloaded and sources:
            return
        for child, part in module.named_children():
            self._visit(join(name, child), part)

    def _settle(self, name: str, place: Place, device: torch.device) -> Source | None:
        """What is to hang there: the tensor on the device, or a meta tensor; then also where its values are."""
        is_movable = place.is_stored and (self._buffers or not place.is_buffer)
        source = self._source(name, place, device) if is_movable else None
        old, first = place.tensor, self._firsts[name]
        if source is None:
            key = (first, device)
            if key not in self._placed:
                self._placed[key] = old if old.device == device else like(old, _real(name, place).to(device))
            self._changes.append((place, self._placed[key]))
        elif not old.is_meta:
            if first not in self._replaced:
                self._replaced[first] = like(old, torch.empty_like(old, device="meta"))
            self._changes.append((place, self._replaced[first]))
        return source


def _place_whole(model: nn.Module, device: torch.device) -> None:
    for name, place in places(model).items():
        if place.tensor.is_meta and device.type != "meta":
            raise _valueless(name)
    model.to(device)


def _real(name: str, place: Place) -> torch.Tensor:
    if place.tensor.is_meta:
        raise _valueless(name)
    return place.tensor.detach()


def _valueless(name: str) -> PrepareError:
    return PrepareError(
        f"{name} has no values: it is on the meta device", "load a checkpoint that has it, or make the model without it"
    )
