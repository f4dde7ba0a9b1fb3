"""Memory limits under which a model spreads evenly over the accelerators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from polyaccel_torch.big_models.sizes import Device, class_names, compute_module_sizes, get_max_memory

# Of a single accelerator whose limit nobody gave, this much is for weights; activations need the rest.
_SHARE_OF_ONE = 0.9
# A device stops at the first module that does not fit, so each gets more than its even part.
_SLACK = 1.25


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    low_zero: bool = False,
) -> dict[Device, int]:
    """`max_memory` for `infer_auto_device_map` that fills accelerators evenly."""
    memory = get_max_memory(max_memory)
    gpus = sorted(device for device in memory if isinstance(device, int) and memory[device] > 0)
    if not gpus:
        return memory
    if len(gpus) == 1:
        if max_memory is None:
            memory[gpus[0]] = int(memory[gpus[0]] * _SHARE_OF_ONE)
        return memory
    spared = 0 if low_zero and 0 in gpus else None
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    even = sizes[""] // (len(gpus) - (spared is not None))
    even += int(_SLACK * max(_largest(model, sizes, class_names(no_split_module_classes)), _mean_leaf(model, sizes)))
    for device in gpus[:-1]:  # the last one takes whatever is left over
        if device != spared:
            memory[device] = min(even, memory[device])
    if spared is not None:
        rest = sizes[""] - sum(memory[device] for device in gpus if device != spared)
        memory[spared] = min(max(0, rest), memory[spared])
    return memory


def _largest(model: nn.Module, sizes: Mapping[str, int], classes: frozenset[str]) -> int:
    found = (sizes.get(name, 0) for name, module in model.named_modules() if type(module).__name__ in classes)
    return max(found, default=0)


def _mean_leaf(model: nn.Module, sizes: Mapping[str, int]) -> int:
    leaves = [sizes[name] for name, part in model.named_modules() if name in sizes and not any(part.children())]
    return sum(leaves) // max(len(leaves), 1)
