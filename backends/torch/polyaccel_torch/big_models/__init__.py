"""Models that are larger than a device, or than memory: what `polyaccel.big_models` forwards to."""

from polyaccel_torch.big_models.align_hooks import (
    AlignDevicesHook,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
    remove_hook_from_submodules,
)
from polyaccel_torch.big_models.alignment import (
    align_module_device,
    get_non_persistent_buffers,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    id_tensor_storage,
    load_state_dict,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)
from polyaccel_torch.big_models.balance import get_balanced_memory
from polyaccel_torch.big_models.casting import CASTABLE_LAYERS, LayerwiseCastingHook, attach_layerwise_casting_hooks
from polyaccel_torch.big_models.device_map import check_device_map, infer_auto_device_map, merged
from polyaccel_torch.big_models.dispatch import cpu_offload, disk_offload, dispatch_model
from polyaccel_torch.big_models.empty import init_empty_weights, init_on_device
from polyaccel_torch.big_models.layers import (
    calculate_maximum_sizes,
    check_tied_parameters_on_same_device,
    compute_module_total_buffer_size,
    dtype_byte_size,
    get_max_layer_size,
    get_module_size_with_ties,
)
from polyaccel_torch.big_models.loading import load_weights
from polyaccel_torch.big_models.module_hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from polyaccel_torch.big_models.sizes import compute_module_sizes, get_max_memory, parse_bytes
from polyaccel_torch.big_models.tensors import find_tied_parameters
from polyaccel_torch.big_models.weight_maps import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    extract_submodules_state_dict,
    load_offloaded_weight,
    load_offloaded_weights,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)
from polyaccel_torch.big_models.weights import torch_file_weights
from polyaccel_torch.big_models.whole_model import CpuOffload, UserCpuOffloadHook, cpu_offload_with_hook
from polyaccel_torch.dialect.meshes import named_mesh
from polyaccel_torch.dialect.regions import compile_regions, has_compiled_regions

__all__ = [
    "AlignDevicesHook",
    "CASTABLE_LAYERS",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "align_module_device",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "attach_layerwise_casting_hooks",
    "calculate_maximum_sizes",
    "compile_regions",
    "check_device_map",
    "check_tied_parameters_on_same_device",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "dtype_byte_size",
    "extract_submodules_state_dict",
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
    "has_compiled_regions",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_offloaded_weight",
    "load_offloaded_weights",
    "load_state_dict",
    "load_weights",
    "merged",
    "named_mesh",
    "named_module_tensors",
    "offload_state_dict",
    "offload_weight",
    "parse_bytes",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
    "retie_parameters",
    "save_offload_index",
    "set_module_tensor_to_device",
    "torch_file_weights",
]
