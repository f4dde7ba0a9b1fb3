"""Models that are larger than a device, or than memory: what `polyaccel.big_models` forwards to."""

from polyaccel_torch.big_models.balance import get_balanced_memory
from polyaccel_torch.big_models.device_map import infer_auto_device_map
from polyaccel_torch.big_models.dispatch import cpu_offload, disk_offload, dispatch_model
from polyaccel_torch.big_models.empty import init_empty_weights, init_on_device
from polyaccel_torch.big_models.hooks import remove_hook_from_submodules
from polyaccel_torch.big_models.loading import load_weights
from polyaccel_torch.big_models.sizes import compute_module_sizes
from polyaccel_torch.big_models.weights import torch_file_weights
from polyaccel_torch.big_models.whole_model import cpu_offload_with_hook

__all__ = [
    "compute_module_sizes",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "get_balanced_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_weights",
    "remove_hook_from_submodules",
    "torch_file_weights",
]
