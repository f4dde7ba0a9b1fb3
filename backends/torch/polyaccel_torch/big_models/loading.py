"""Weights of a checkpoint into a model, one at a time: each goes from the mapped file straight to its device, or stays in the file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel.errors import CheckpointError, ConfigError
from polyaccel.stored import StoredWeight
from polyaccel_torch.big_models.device_map import device_of
from polyaccel_torch.big_models.sizes import Device
from polyaccel_torch.big_models.tensors import Place, is_inside, like, places, resolve_device, resolve_dtype
from polyaccel_torch.big_models.weights import OpenFiles, add_to_index, index_entry, write_weight

_log = logging.getLogger(__name__)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, StoredWeight],
    checkpoint: str,
    *,
    device_map: Mapping[str, Device] | None,
    offload_folder: str | os.PathLike[str] | None,
    dtype: str | torch.dtype | None,
    offload_buffers: bool,
    keep_in_fp32_modules: Iterable[str] | None,
    strict: bool,
) -> None:
    """Give the model's tensors these values; `checkpoint` is the place that errors name.

    Raises CheckpointError, before anything changes, for a weight of another shape, and with `strict` for names that differ.
    """
    held = {name: place for name, place in places(model).items() if place.is_stored}
    groups = _groups(held)
    _check_names(model, held, groups, weights, checkpoint, strict=strict)
    _check_shapes(held, weights, checkpoint)
    wanted = resolve_dtype(dtype)
    loading = _Loading(device_map, offload_folder, offload_buffers)
    loading.check({name: place for name, place in held.items() if name in weights})
    with OpenFiles() as files:
        for group in groups:
            # Where a file has several names of a tied parameter, `load_state_dict` lets the last one win.
            given = [name for name in group if name in weights]
            if given:
                kept = _dtype(given[-1], held[given[-1]].tensor, wanted, keep_in_fp32_modules)
                loading.load(group, held, weights[given[-1]], kept, files)
    if loading.index:
        assert offload_folder is not None
        add_to_index(offload_folder, loading.index)


class _Loading:
    """Places weights; `index` is what stays on disk."""

    def __init__(
        self, device_map: Mapping[str, Device] | None, folder: str | os.PathLike[str] | None, buffers: bool
    ) -> None:
        self.index: dict[str, Any] = {}
        self._map = device_map
        self._folder = folder
        self._buffers = buffers
        self._devices = {
            key: resolve_device(device, f"device_map[{key!r}]")
            for key, device in (device_map or {}).items()
            if device != "disk"
        }
        if folder is None and "disk" in (device_map or {}).values():
            raise ConfigError(
                "device_map has 'disk', and offload_folder is not given",
                "give offload_folder=; safetensors are not copied there, only an index of them is written",
            )

    def check(self, held: Mapping[str, Place]) -> None:
        """Raises ConfigError for a name without a device."""
        for name, place in held.items():
            self._device(name, place.tensor)

    def load(
        self, group: list[str], held: Mapping[str, Place], weight: StoredWeight, dtype: torch.dtype, files: OpenFiles
    ) -> None:
        """One parameter or buffer, under all its names."""
        on_disk = [name for name in group if self._is_on_disk(name, held[name])]
        if on_disk:
            entry = self._entry(on_disk[0], weight, dtype, files)
            away = like(held[on_disk[0]].tensor, torch.empty(weight.shape, dtype=dtype, device="meta"))
            for name in on_disk:
                self.index[name] = entry
                held[name].put(away)
        there: dict[torch.device, torch.Tensor] = {}
        for name in group:
            if name not in on_disk:
                device = self._device(name, held[name].tensor)
                if device not in there:
                    there[device] = _loaded(held[name].tensor, files.weight(weight), device, dtype)
                held[name].put(there[device])

    def _is_on_disk(self, name: str, place: Place) -> bool:
        if self._map is None or device_of(name, self._map) != "disk":
            return False
        return self._buffers or not place.is_buffer

    def _device(self, name: str, tensor: torch.Tensor) -> torch.device:
        if self._map is None:
            return torch.device("cpu") if tensor.is_meta else tensor.device
        key = name
        while key and key not in self._map:
            key = key.rpartition(".")[0]
        if key not in self._map:
            raise ConfigError(f"device_map has no device for {name}", "add an entry for it, or '' for everything else")
        return self._devices.get(key, torch.device("cpu"))  # a buffer of a module on disk

    def _entry(self, name: str, weight: StoredWeight, dtype: torch.dtype, files: OpenFiles) -> dict[str, Any]:
        assert self._folder is not None
        piece = weight.pieces[0]
        if len(weight.pieces) == 1 and piece.file.suffix == ".safetensors":
            return index_entry(piece.file, piece.key, dtype, weight.shape)
        return write_weight(self._folder, name, files.weight(weight).to(dtype))


def _loaded(old: torch.Tensor, value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if (old.device, old.dtype, old.shape) == (device, dtype, value.shape) and not old.is_meta:
        with torch.no_grad():
            old.copy_(value)  # the same object: optimizers and other modules may hold it
        return old
    # In memory of its own: the file may go once the model is loaded.
    loaded: torch.Tensor = like(old, torch.empty(value.shape, dtype=dtype, device=device))
    with torch.no_grad():
        loaded.copy_(value)
    return loaded


def _groups(held: Mapping[str, Place]) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, place in held.items():
        found.setdefault(id(place.tensor), []).append(name)
    return list(found.values())


def _check_names(
    model: nn.Module,
    held: Mapping[str, Place],
    groups: list[list[str]],
    weights: Mapping[str, StoredWeight],
    checkpoint: str,
    *,
    strict: bool,
) -> None:
    missing = [group[0] for group in groups if not any(name in weights for name in group)]
    unexpected = [name for name in weights if name not in held and not name.endswith("_extra_state")]
    parts = []
    if missing:
        parts.append(f"it lacks {_named(missing)} of {type(model).__name__}")
    if unexpected:
        parts.append(f"{type(model).__name__} has no {_named(unexpected)}")
    if not parts:
        return
    message = f"{checkpoint} does not fit: {'; '.join(parts)}"
    if groups and len(missing) == len(groups):
        raise CheckpointError(
            f"{message}; they have no name in common", "choose the right model, or rename its modules"
        )
    if strict:
        raise CheckpointError(message, "load with strict=False to leave these as they are, or choose the right model")
    _log.warning("%s%s", message, "; its weights of other names were not used when it was loaded" if unexpected else "")


def _named(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def _check_shapes(held: Mapping[str, Place], weights: Mapping[str, StoredWeight], checkpoint: str) -> None:
    for name, place in held.items():
        if name in weights and weights[name].shape != tuple(place.tensor.shape):
            raise CheckpointError(
                f"{checkpoint} has {name} of shape {list(weights[name].shape)}, and the model {list(place.tensor.shape)}",
                "build the model with the configuration that the checkpoint was trained with",
            )


def _dtype(
    name: str, tensor: torch.Tensor, wanted: torch.dtype | None, keep_in_fp32: Iterable[str] | None
) -> torch.dtype:
    """As `load_state_dict` does, the model's own dtype, unless floating point numbers were asked for in another one."""
    if wanted is None or not tensor.is_floating_point():
        return tensor.dtype
    kept = any(is_inside(name, key) or f"{key}." in name for key in keep_in_fp32 or ())
    return torch.float32 if kept and wanted == torch.float16 else wanted
