"""The largest part of a model that is not split, and what tied parameters add to a part."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from polyaccel_torch.big_models.device_map import device_of
from polyaccel_torch.big_models.sizes import class_names, compute_module_sizes
from polyaccel_torch.big_models.tensors import is_inside, join

_log = logging.getLogger(__name__)
_LESS_THAN_A_BYTE = {"bool": 1, "uint1": 1, "uint2": 2, "uint4": 4, "int1": 1, "int2": 2, "int4": 4}


def dtype_byte_size(dtype: torch.dtype) -> float:
    """Bytes of a number of this dtype as it can be packed: an eighth for bool, a half for 4 bits."""
    bits = _LESS_THAN_A_BYTE.get(str(dtype).removeprefix("torch."))
    return dtype.itemsize if bits is None else bits / 8


def compute_module_total_buffer_size(
    model: nn.Module, dtype: Any = None, special_dtypes: Mapping[str, Any] | None = None
) -> int:
    """Bytes of all buffers."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def get_max_layer_size(
    modules: Iterable[tuple[str, Any]],
    module_sizes: Mapping[str, int],
    no_split_module_classes: str | Iterable[str] | None = None,
) -> tuple[int, list[str]]:
    """Bytes of the largest layer, and the names of all of that size. A layer has no modules inside, or one of the classes."""
    whole = class_names(no_split_module_classes)
    layers: dict[str, int] = {}
    waiting = list(modules)
    while waiting:
        name, module = waiting.pop(0)
        children = list(module.named_children()) if isinstance(module, nn.Module) else []
        if children and type(module).__name__ not in whole:
            waiting = [(join(name, child), part) for child, part in children] + waiting
        else:
            layers[name] = module_sizes.get(name, 0)
    largest = max(layers.values(), default=0)
    return largest, [name for name, size in layers.items() if size == largest and size]


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Bytes of the whole model, and `get_max_layer_size` of it; a transformers model says itself which classes stay in one piece."""
    sizes = compute_module_sizes(model)
    found: Any = getattr(model, "_no_split_modules", None)
    whole: Collection[str] = found or ()
    return sizes[""], get_max_layer_size(list(model.named_children()), sizes, whole)


def get_module_size_with_ties(
    tied_params: list[str], module_size: int, module_sizes: Mapping[str, int], modules_to_treat: list[tuple[str, Any]]
) -> tuple[int, list[str], list[Any]]:
    """Bytes of a module with all modules that share its parameters, their names, and they; a shared parameter counts once."""
    owners = [next(part for part in modules_to_treat if is_inside(name, part[0])) for name in tied_params]
    added = sum(module_sizes[owner] - module_sizes[name] for name, (owner, _) in zip(tied_params, owners, strict=True))
    return module_size + added, [name for name, _ in owners], [module for _, module in owners]


def check_tied_parameters_on_same_device(tied_params: Iterable[list[str]], device_map: Mapping[str, Any]) -> None:
    """Warns where a device map parts what is tied."""
    for group in tied_params:
        devices = {name: device_of(name, device_map) for name in group}
        if len(set(devices.values())) > 1:
            _log.warning("tied parameters go to different devices: %s; give them one, or device_map='auto'", devices)
