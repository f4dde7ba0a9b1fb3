"""`accelerate.utils.modeling`: a model's tensors, their sizes and their devices.

What is not in `polyaccel.big_models` is the torch adapter's, which is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from polyaccel.big_models import (
    align_module_device,
    compute_module_sizes,
    get_balanced_memory,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    infer_auto_device_map,
    load_checkpoint_in_model,
    served,
)

_SERVED = {
    "convert_file_size_to_int": "parse_bytes",
    **{
        name: name
        for name in (
            "calculate_maximum_sizes",
            "check_device_map",
            "check_tied_parameters_on_same_device",
            "compute_module_total_buffer_size",
            "dtype_byte_size",
            "find_tied_parameters",
            "get_max_layer_size",
            "get_max_memory",
            "get_module_size_with_ties",
            "get_non_persistent_buffers",
            "get_state_dict_from_offload",
            "id_tensor_storage",
            "load_offloaded_weights",
            "load_state_dict",
            "named_module_tensors",
            "retie_parameters",
            "set_module_tensor_to_device",
        )
    },
}

__all__ = [  # noqa: F822 - most are served by __getattr__
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_module_size_with_ties",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]


def clean_device_map(device_map: MutableMapping[str, Any], module_name: str = "") -> MutableMapping[str, Any]:
    """One entry in `device_map` for a module whose parts are all on one device, for those inside `module_name`. Returns the map."""
    prefix = f"{module_name}." if module_name else ""
    inside = {name: device for name, device in device_map.items() if name.startswith(prefix)}
    short = served("merged")({name.removeprefix(prefix): device for name, device in inside.items()})
    for name in inside:
        del device_map[name]
    device_map.update({f"{prefix}{name}" if name else module_name: device for name, device in short.items()})
    return device_map


def __getattr__(name: str) -> Any:
    if name not in _SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served(_SERVED[name])
