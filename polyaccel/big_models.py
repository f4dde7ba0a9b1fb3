"""Models that are larger than a device, or than memory, with Accelerate's names. Each call forwards to the torch backend.

Importing these names imports no framework; calling one does, or raises BackendUnavailableError with the line that installs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.locate import locate_weights
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.registry import served_by

Model = Any  # torch.nn.Module
Device = Any  # an accelerator's index, "cpu", "disk", a torch.device or its name
Dtype = Any  # torch.dtype or its name
Location = str | os.PathLike[str]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[None]:
    """Context: parameters of modules made inside have a shape and no memory; buffers are made as always unless `include_buffers`."""
    return _backend().init_empty_weights(include_buffers)


def init_empty_where_torch_is_used() -> AbstractContextManager[None]:
    """Context: `init_empty_weights` in a script that has imported torch; nothing in others."""
    return init_empty_weights() if "torch" in sys.modules else nullcontext()


def init_on_device(device: Device, include_buffers: bool | None = None) -> AbstractContextManager[None]:
    """Context: parameters of modules made inside (and buffers, with `include_buffers`) are on `device`."""
    return _backend().init_on_device(device, include_buffers)


def compute_module_sizes(
    model: Model,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module and tensor by full name, "" for the whole model.

    `dtype` counts floating point in that dtype, `special_dtypes` some tensors in their own. A tied parameter counts once.
    """
    return _backend().compute_module_sizes(model, dtype, special_dtypes, buffers_only)


def infer_auto_device_map(
    model: Model,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Device]:
    """A device for every module, in the model's order: accelerators first, then "cpu", then "disk".

    The first accelerator, and the CPU, keep room for the largest layer that comes after them, since it may be brought in. Modules
    that share a parameter go to one device.

    Args:
        max_memory: bytes, or a size such as "10GB", by device: 0, 1, ..., "cpu". None: what is free on this machine now.
        no_split_module_classes: names of classes whose instances stay in one piece (blocks with a residual connection).
        dtype, special_dtypes: what the weights will be loaded as, if not as what they are.
        verbose: print each decision.
        clean_result: one entry for a module whose parts are all on one device.
        offload_buffers: buffers of modules on the CPU or disk stay there too; without it, a warning says where they do not fit.
        fallback_allocation: on a device that would stay empty, place a later and smaller module.

    Raises ConfigError for an unknown device or size.
    """
    return _backend().infer_auto_device_map(
        model,
        max_memory,
        no_split_module_classes,
        dtype,
        special_dtypes,
        verbose,
        clean_result,
        offload_buffers,
        fallback_allocation,
    )


def get_balanced_memory(
    model: Model,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    low_zero: bool = False,
) -> dict[Device, int]:
    """`max_memory` under which `infer_auto_device_map` fills all accelerators about evenly; device 0 as little as possible
    with `low_zero`."""
    return _backend().get_balanced_memory(model, max_memory, no_split_module_classes, dtype, special_dtypes, low_zero)


def load_checkpoint_in_model(
    model: Model,
    checkpoint: Location,
    device_map: Mapping[str, Device] | None = None,
    offload_folder: Location | None = None,
    dtype: Dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Give the model the weights of a checkpoint, one at a time, each on its device; then call `dispatch_model`.

    Args:
        checkpoint: a safetensors file, an index of several, a folder with either, the same of torch's own files (read as data), or a
            checkpoint of `accelerator.save_state` (the group `model`).
        device_map: device by module name; "disk" leaves weights in their file. None: where the model's tensors are, the CPU for
            those on the meta device.
        offload_folder: gets the index of what stays on disk, and copies of what is not in a safetensors file in one piece.
        dtype: of floating point weights. None: the model's own.
        offload_state_dict: accepted; weights are mapped and never in memory together, which is what it asks for.
        offload_buffers: buffers of modules on disk stay there too.
        keep_in_fp32_modules: stay in float32 where dtype is float16.
        strict: names that only one side has are an error, not a warning.

    Raises CheckpointError, before anything changes, for other shapes, no common name, or with `strict` other names; ConfigError
    without an `offload_folder` where the map has "disk"; UnsupportedError for the last three, where they are not their defaults.
    """
    refused = {
        "offload_8bit_bnb": (offload_8bit_bnb, "load with dtype='bfloat16'; bitsandbytes is not supported"),
        "full_state_dict": (not full_state_dict, "load the whole state dict, before the model is sharded"),
        "broadcast_from_rank0": (
            broadcast_from_rank0,
            "let every process read the checkpoint: it is mapped, not copied",
        ),
    }
    for name, (is_given, hint) in refused.items():
        if is_given:
            raise UnsupportedError(f"load_checkpoint_in_model cannot honour {name}", hint)
    backend = _backend()
    backend.load_weights(
        model,
        locate_weights(Path(checkpoint), backend.torch_file_weights),
        os.fspath(checkpoint),
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_buffers=offload_buffers,
        keep_in_fp32_modules=keep_in_fp32_modules,
        strict=strict,
    )


def dispatch_model(
    model: Model,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: Mapping[str, Any] | None = None,
    offload_dir: Location | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
) -> Model:
    """Spread the model over devices, and return it: hooks move inputs along, bring weights in for a forward and drop them after it.

    Args:
        device_map: device by module name, "" for the rest. "cpu" computes on the CPU only if no accelerator is in the map; "disk" never.
        main_device: where weights from the CPU and disk are brought. None: the first accelerator of the map, else the CPU.
        state_dict: values for weights on the CPU, instead of the model's.
        offload_dir: gets the weights of modules on "disk", in safetensors files; what is on the meta device is looked up there.
        offload_index: where weights on disk are: {name: {"safetensors_file", "weight_name", "dtype"}}.
        offload_buffers: buffers go away with the weights.
        skip_keys: keyword arguments and keys of outputs that are not moved.
        preload_module_classes: classes whose forward uses weights of submodules without calling them: all come in at once.
        force_hooks: hooks also where all is on one device.

    Outputs are on the device of the inputs. Weights that are away are for inference: a backward that needs their gradient raises
    PrepareError. Raises ConfigError for a map that leaves a tensor out, PlanError for a device that is not here, PrepareError
    for a weight without values.
    """
    return _backend().dispatch_model(
        model,
        device_map,
        main_device,
        state_dict,
        offload_dir,
        offload_index,
        offload_buffers,
        skip_keys,
        preload_module_classes,
        force_hooks,
    )


def load_checkpoint_and_dispatch(
    model: Model,
    checkpoint: Location,
    device_map: str | Mapping[str, Device] | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    offload_folder: Location | None = None,
    offload_buffers: bool = False,
    dtype: Dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Collection[str] | None = None,
    preload_module_classes: Collection[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> Model:
    """`load_checkpoint_in_model`, then `dispatch_model`; returns the model.

    `device_map`: a map, or how to make one: "auto" and "balanced" (evenly over the accelerators), "balanced_low_0" (little on the
    first), "sequential" (one after the other). None: the weights are loaded, and nothing is dispatched. Raises ConfigError for
    another name, and what the two raise.
    """
    if isinstance(device_map, str):
        if device_map not in _AUTOMATIC:
            raise ConfigError(f"device_map={device_map!r} is unknown", f"use a map, or one of {', '.join(_AUTOMATIC)}")
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes, dtype, low_zero=low_zero)
        device_map = infer_auto_device_map(
            model, max_memory, no_split_module_classes, dtype, offload_buffers=offload_buffers
        )
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map,
        offload_folder,
        dtype,
        offload_state_dict=bool(offload_state_dict),
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
    )


def cpu_offload(
    model: Model,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Any] | None = None,
    preload_module_classes: Collection[str] | None = None,
) -> Model:
    """Keep every weight in host memory and bring it to `execution_device` (None: where the model is) for its module's forward."""
    return _backend().cpu_offload(model, execution_device, offload_buffers, state_dict, preload_module_classes)


def cpu_offload_with_hook(
    model: Model, execution_device: Device | None = None, prev_module_hook: Any = None
) -> tuple[Model, Any]:
    """Move the whole model to the CPU until its next forward, which brings it to `execution_device` and leaves it there.

    Returns the model and a hook: `hook.offload()` sends it back, `hook.remove()` ends this. `prev_module_hook`, that of another model,
    is offloaded when this one starts. None as device: the first accelerator, else the CPU.
    """
    return _backend().cpu_offload_with_hook(model, execution_device, prev_module_hook)


def disk_offload(
    model: Model,
    offload_dir: Location,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Collection[str] | None = None,
) -> Model:
    """Keep every weight in a safetensors file in `offload_dir`, and map it for its module's forward.

    What the model holds is written there; what it has no values of (meta device) is looked up in the folder's index. Raises
    PrepareError for a weight that is in neither.
    """
    return _backend().disk_offload(model, offload_dir, execution_device, offload_buffers, preload_module_classes)


def remove_hook_from_submodules(module: Model) -> None:
    """Undo `dispatch_model`, `cpu_offload` and `disk_offload`: no hooks any more, and weights that were away are on the CPU."""
    _backend().remove_hook_from_submodules(module)


def align_module_device(module: Model, execution_device: Device | None = None) -> AbstractContextManager[None]:
    """Context: the module's own weights are on `execution_device`, for code that reads or writes them outside a forward.

    Without a device, weights that are offloaded come to where the module computes, and others stay. What is written inside is kept.
    """
    return _backend().align_module_device(module, execution_device)


def has_offloaded_params(module: Model) -> bool:
    """Whether weights of this module itself are away between forwards."""
    return _backend().has_offloaded_params(module)


def get_state_dict_offloaded_model(model: Model) -> dict[str, Any]:
    """The state dict with the values of weights that are away; those in files are mapped. Raises PrepareError for what is nowhere."""
    return _backend().get_state_dict_offloaded_model(model)


def attach_layerwise_casting_hooks(
    module: Model,
    storage_dtype: Any,
    compute_dtype: Any,
    skip_modules_pattern: str | Iterable[str] | None = None,
    skip_modules_classes: tuple[type, ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Keep weights of linear and convolution layers in one dtype (such as torch.float8_e4m3fn), and compute in another.

    Modules whose name one of the patterns (regular expressions) matches, or whose class is listed, stay as they are, with all inside
    them. For inference: a float8 weight has no gradient.
    """
    _backend().attach_layerwise_casting_hooks(
        module, storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, non_blocking
    )


def served(name: str) -> Any:
    """A class or function of the torch adapter, by name: what `polyaccel.compat` gives Accelerate's names to. Raises AttributeError."""
    return getattr(_backend(), name)


def _backend() -> Any:
    return served_by("torch", "big_models", "serves no big models")
