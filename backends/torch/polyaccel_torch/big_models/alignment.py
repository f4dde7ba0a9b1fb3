"""Single tensors of a model: put somewhere else, given a value, or brought in from where they are offloaded for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyaccel.errors import ConfigError, PrepareError, UnsupportedError
from polyaccel_torch.big_models.align_hooks import TiedTensors, weights_hooks
from polyaccel_torch.big_models.device_map import device_of
from polyaccel_torch.big_models.tensors import direct_places, join, like, place_in_model, resolve_device, resolve_dtype
from polyaccel_torch.big_models.weights import OpenFiles, read_torch_file


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: int | str | torch.device,
    value: Any = None,
    dtype: str | torch.dtype | None = None,
    fp16_statistics: torch.Tensor | None = None,
    tied_params_map: TiedTensors | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Put a parameter or buffer on a device, with a new value if one is given; ties to it end, unless `tied_params_map` has them.

    Args:
        tensor_name: its full name inside `module`.
        value: of the same shape. None: the present one.
        dtype: of a floating point tensor. None: what it has in the module.
        tied_params_map: {address: {device: tensor}}: what is there is used, and what comes there is added.
        non_blocking: a copy to an accelerator runs on while the caller does.
        clear_cache: give memory that the device's allocator holds back to it.

    Raises ConfigError for an unknown name, another shape, or no value at all; UnsupportedError for `fp16_statistics` (bitsandbytes).
    """
    if fp16_statistics is not None:
        raise UnsupportedError("fp16_statistics belong to 8-bit weights of bitsandbytes", "load with dtype='bfloat16'")
    place = place_in_model(module, tensor_name)
    old, target, wanted = place.tensor, resolve_device(device, "device"), resolve_dtype(dtype)
    if value is not None and not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value)
    origin = old if value is None else value
    known = None if tied_params_map is None or origin.is_meta else tied_params_map.get(origin.data_ptr())
    if known is not None and target in known:
        place.put(known[target])
        return
    if value is None and old.is_meta and target.type != "meta":
        raise ConfigError(f"{tensor_name} has no values: it is on the meta device", "give value=")
    if origin.shape != old.shape:
        raise ConfigError(
            f"{tensor_name} has shape {list(old.shape)}, and the value {list(origin.shape)}",
            "build the model with the configuration that the value was made with",
        )
    stored = old.dtype if wanted is None or not origin.is_floating_point() else wanted
    if wanted is not None and not origin.is_floating_point():
        stored = origin.dtype
    if value is not None or (old.device, old.dtype) != (target, stored):
        place.put(like(old, origin.detach().to(target, stored, non_blocking=non_blocking)))
    if known is not None:
        known[target] = place.tensor
    if clear_cache and target.type not in ("cpu", "meta"):
        torch.accelerator.memory.empty_cache()


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether weights of this module itself are away, and come in for its forward."""
    return bool(weights_hooks(module))


@contextmanager
def align_module_device(module: nn.Module, execution_device: int | str | torch.device | None = None) -> Iterator[None]:
    """Context: the module's own weights are on `execution_device`; afterwards they are back where they were.

    Without it, weights that are offloaded are where the module computes, and others stay. What is written to offloaded weights inside
    is kept.
    """
    device = None if execution_device is None else resolve_device(execution_device, "execution_device")
    hooks = weights_hooks(module)
    own = [] if hooks or device is None else [place for place in direct_places(module) if not place.is_buffer]
    before = [place.tensor for place in own]
    entered = []
    try:
        for hook in hooks:
            computing = hook.device
            hook.device = device or computing
            entered.append((hook, computing))
            hook.enter(module, (), {})
        for place, old in zip(own, before, strict=True):
            assert device is not None
            if old.device != device:
                place.put(like(old, old.detach().to(device)))
        yield
    finally:
        for place, old in zip(own, before, strict=True):
            now = place.tensor
            if now is not old:
                place.put(old)
                if not now.is_meta and not old.is_meta:
                    with torch.no_grad():
                        old.copy_(now)
        for hook, computing in reversed(entered):
            hook.leave(module, (), None)
            hook.device = computing


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, Any]:
    """The state dict with the values of weights that are away; those in files are mapped. Raises PrepareError for what is nowhere."""
    state = model.state_dict()
    with OpenFiles() as files:
        for prefix, module in model.named_modules(remove_duplicate=False):
            for hook in weights_hooks(module):
                for name, source in hook.sources.items():
                    full = join(prefix, name)
                    if full in state and state[full].is_meta:
                        state[full] = source.read(torch.device("cpu"), state[full].dtype, files)
    lost = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if lost:
        raise PrepareError(f"{lost[0]} has no values: it is on the meta device", "load a checkpoint that has it")
    return dict(state)


def get_state_dict_from_offload(
    module: nn.Module,
    module_name: str,
    state_dict: dict[str, Any],
    device_to_put_offload: int | str | torch.device = "cpu",
) -> dict[str, Any]:
    """Put the values of a module's offloaded weights into `state_dict`, and return it. `module_name`: "block.linear.weight" as well."""
    prefix = module_name.rpartition(".")[0]
    device = resolve_device(device_to_put_offload, "device_to_put_offload")
    with OpenFiles() as files:
        for hook in weights_hooks(module):
            for name, source in hook.sources.items():
                full = join(prefix, name)
                if full in state_dict:
                    state_dict[full] = source.read(device, state_dict[full].dtype, files)
    return state_dict


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, by name; `remove_non_persistent` leaves out buffers that are in no state dict."""
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        hidden = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
        for name, buffer in module.named_buffers(recurse=recurse):
            if name not in hidden:
                yield name, buffer


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """The names of buffers that are in no state dict: full with `fqns`, else as their own modules call them."""
    parts = module.named_modules() if recurse else [("", module)]
    return {join(prefix, name) if fqns else name for prefix, part in parts for name in part._non_persistent_buffers_set}


def retie_parameters(model: nn.Module, tied_params: list[list[str]]) -> None:
    """Make each group of names one tensor again: the first that has values."""
    for group in tied_params:
        found = [place_in_model(model, name) for name in group]
        first = next((place.tensor for place in found if not place.tensor.is_meta), None)
        if first is not None:
            for place in found:
                place.put(first)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What two tensors have in common that use the same memory: device, address and bytes. All tensors without memory look the same."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or torch file, each on its device of the map; "disk", and no device, mean the CPU."""
    path = os.fspath(checkpoint_file)
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with OpenFiles() as files, safe_open(path, framework="pt") as opened:
            found = {name: files.tensor(path, name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    else:
        from pathlib import Path

        found = read_torch_file(Path(path))
    places: dict[str, Any] = {}
    for name in found:
        device = device_of(name, device_map) if device_map is not None else None
        places[name] = "cpu" if device in (None, "disk") else device
    return {name: value.to(resolve_device(places[name], f"device_map of {name}")) for name, value in found.items()}
