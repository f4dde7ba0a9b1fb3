"""Which module goes to which device: filled in the model's order, tied parameters together, with room for what is brought in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel.errors import ConfigError
from polyaccel_torch.big_models.sizes import Device, class_names, compute_module_sizes, get_max_memory
from polyaccel_torch.big_models.tensors import find_tied_parameters, is_inside, join

_log = logging.getLogger(__name__)
_Part = tuple[str, nn.Module | torch.Tensor]


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Device]:
    """A device for every module: accelerators first, then "cpu", then "disk"."""
    memory = get_max_memory(max_memory)
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    filling = _Filling(model, memory, sizes, class_names(no_split_module_classes), verbose, fallback_allocation)
    filling.run()
    if not offload_buffers:
        buffers = compute_module_sizes(model, dtype, special_dtypes, buffers_only=True)
        _warn_about_buffers(filling, memory, buffers)
    if filling.needed:
        lines = ", ".join(f"{device}: {size} bytes" for device, size in filling.needed.items())
        _log.info(
            "devices with insufficient memory for even one module, and what the next one in line needed there: %s."
            " Give them that much in max_memory, or allow a smaller module out of order with fallback_allocation=True",
            lines,
        )
    return merged(filling.map) if clean_result else filling.map


def merged(device_map: Mapping[str, Device]) -> dict[str, Device]:
    """The same map with one entry for a module whose parts are all on one device."""
    return _merged(dict(device_map), "")


def _merged(entries: dict[str, Device], prefix: str) -> dict[str, Device]:
    if len(entries) < 2:
        return entries
    if len(set(entries.values())) == 1:
        return {prefix: next(iter(entries.values()))}
    depth = len(prefix.split(".")) if prefix else 0
    groups: dict[str, dict[str, Device]] = {}
    for name, device in entries.items():
        groups.setdefault(".".join(name.split(".")[: depth + 1]), {})[name] = device
    result: dict[str, Device] = {}
    for name, group in groups.items():
        result.update(_merged(group, name))
    return result


def check_device_map(model: nn.Module, device_map: Mapping[str, Device]) -> None:
    """Warns of entries that are nothing in the model. Raises ConfigError where a tensor has no device."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known.update(name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()))
    unknown = [name for name in device_map if name not in known]
    if unknown:
        warnings.warn(f"device_map keys do not match any submodules or tensors: {', '.join(unknown)}", stacklevel=3)
    homeless = [name for name in model.state_dict(keep_vars=True) if device_of(name, device_map) is None]
    if homeless:
        raise ConfigError(
            f"device_map has no device for {', '.join(homeless[:8])}{' and others' if len(homeless) > 8 else ''}",
            "add an entry for each, or '' for everything that has none",
        )


def device_of(name: str, device_map: Mapping[str, Device]) -> Device | None:
    """The device of the longest entry that a name is inside of; None where there is none."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


class _Filling:
    """One pass over the model. `used` includes the room kept for what is brought in; `needed` is what empty devices lacked."""

    def __init__(
        self,
        model: nn.Module,
        memory: dict[Device, int],
        sizes: dict[str, int],
        whole: frozenset[str],
        verbose: bool,
        fallback: bool,
    ) -> None:
        self.map: dict[str, Device] = {}
        self.used: dict[Device, int] = {}
        self.needed: dict[Device, int] = {}
        self.gpus = [device for device in memory if device not in ("cpu", "disk")]
        self._memory = memory
        self._devices = [*(device for device in memory if device != "disk"), "disk"]
        # Weights that are on the CPU or on disk pass through these.
        self._passage = {"mps"} if "mps" in self.gpus else {*self.gpus[:1], "cpu"}
        self._sizes = sizes
        self._whole = whole
        self._tied = find_tied_parameters(model)
        self._verbose = verbose
        self._fallback = fallback
        self._queue = _parts("", model)
        self._layers: dict[str, int] = {}

    def run(self) -> None:
        """Place everything."""
        while self._queue:
            self._place_next()

    def _place_next(self) -> None:
        device = self._devices[0]
        (name, part), *rest = self._queue
        ties = self._ties(name, rest)
        size = self._sizes.get(name, 0)
        together = size + sum(self._sizes.get(tied, 0) for tied, _ in ties)
        if device == "disk":
            self._assign(name, ties, together)
            return
        used = self.used.get(device, 0)
        reserved = self._largest_layer(rest) if device in self._passage else 0
        limit = self._memory[device] - reserved
        if used + together <= limit:
            self._assign(name, ties, together)
            return
        if ties and used + size <= limit:
            for tied in ties:
                if self._can_split(tied[1]):
                    self._split(tied)
                    return
        if used + size >= limit and self._can_split(part):
            self._split((name, part))
            return
        if self._fallback and not used:
            found = self._smaller(rest, self._memory[device] - max(reserved, together))
            if found is not None:
                self._queue.remove(found)
                self._queue.insert(0, found)
                return
        if not used:
            self.needed[device] = together + reserved
        self.used[device] = used + reserved
        self._say(f"{name} ({together} bytes) does not fit on {device}: {limit - used} bytes are left there")
        del self._devices[0]

    def _assign(self, name: str, ties: list[_Part], size: int) -> None:
        device = self._devices[0]
        self.used[device] = self.used.get(device, 0) + size
        placed = [name, *(tied for tied, _ in ties)]
        self.map.update(dict.fromkeys(placed, device))
        self._queue = [part for part in self._queue if part[0] not in placed]
        self._say(f"{' with '.join(placed)} ({size} bytes) goes to {device}")

    def _ties(self, name: str, rest: list[_Part]) -> list[_Part]:
        """What waits and shares a parameter with `name`: it goes where `name` goes."""
        shared = {
            other
            for group in self._tied
            if any(is_inside(tied, name) for tied in group)
            for other in group
            if not is_inside(other, name)
        }
        return [part for part in rest if any(is_inside(other, part[0]) for other in shared)]

    def _can_split(self, part: nn.Module | torch.Tensor) -> bool:
        return isinstance(part, nn.Module) and any(part.children()) and type(part).__name__ not in self._whole

    def _split(self, part: _Part) -> None:
        at = self._queue.index(part)
        name, module = part
        assert isinstance(module, nn.Module)
        self._queue[at : at + 1] = _parts(name, module)
        self._say(f"{name} is split")

    def _largest_layer(self, parts: list[_Part]) -> int:
        return max((self._layer(name, part) for name, part in parts if isinstance(part, nn.Module)), default=0)

    def _layer(self, name: str, module: nn.Module) -> int:
        if name not in self._layers:
            inside = [self._layer(join(name, child), part) for child, part in module.named_children()]
            is_layer = not inside or type(module).__name__ in self._whole
            self._layers[name] = self._sizes.get(name, 0) if is_layer else max(inside)
        return self._layers[name]

    def _smaller(self, parts: list[_Part], limit: int) -> _Part | None:
        """The first part, or part of a part, that fits with what is tied to it; the queue is split so that it stands there."""
        for name, part in parts:
            ties = self._ties(name, [other for other in self._queue if other[0] != name])
            if self._sizes.get(name, 0) + sum(self._sizes.get(tied, 0) for tied, _ in ties) <= limit:
                return name, part
            if self._can_split(part):
                assert isinstance(part, nn.Module)
                before = self._queue
                self._queue = [*before]
                self._split((name, part))
                found = self._smaller(_parts(name, part), limit)
                if found is not None:
                    return found
                self._queue = before
        return None

    def _say(self, line: str) -> None:
        if self._verbose:
            print(line)  # verbose=True asks for it


def _parts(name: str, module: nn.Module) -> list[_Part]:
    found: list[tuple[str, Any]] = [*module.named_parameters(recurse=False), *module.named_children()]
    found += module.named_buffers(recurse=False)
    return [(join(name, part), value) for part, value in found]


def _warn_about_buffers(filling: _Filling, memory: Mapping[Device, int], buffers: Mapping[str, int]) -> None:
    away = sum(buffers.get(name, 0) for name, device in filling.map.items() if device in ("cpu", "disk"))
    if not away or not filling.gpus:
        return
    if not any(memory[device] >= away + filling.used.get(device, 0) for device in filling.gpus):
        warnings.warn(
            f"the buffers of modules on 'cpu' and 'disk' have {away} bytes, stay on the device that computes, and fit on none;"
            " offload_buffers=True brings them in with the weights",
            stacklevel=3,
        )
