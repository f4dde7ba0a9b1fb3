"""`accelerate.utils.other`: models without their wrappers, weights in a file, and small helpers of training scripts."""

from __future__ import annotations

import functools
import json
import logging
import platform
import re
import socket
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from polyaccel import jobs
from polyaccel.big_models import served
from polyaccel.compat.state import PartialState
from polyaccel.config.resolve import user_config_file
from polyaccel.config.settings import SETTINGS
from polyaccel.config.writing import document, write
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.unwrapping import is_compiled, without_wrappers

log = logging.getLogger("polyaccel.utils.other")
is_compiled_module = is_compiled

_OLDEST_KERNEL = (5, 5, 0)


def compile_regions(module: Any, **compile_kwargs: Any) -> Any:
    """torch.compile the blocks that a module repeats, and its other parts, each for itself; returns the module.

    In place: calls are compiled, and names, parameters and hooks stay as they are, where Accelerate makes a second module around
    compiled copies. `compile_kwargs` are those of torch.compile. A module that repeats nothing is compiled as a whole.
    """
    served("compile_regions")(module, **compile_kwargs)
    return module


def has_compiled_regions(module: Any) -> bool:
    """Whether `compile_regions` has compiled parts of this module."""
    return bool(served("has_compiled_regions")(module))


def wait_for_everyone() -> None:
    """Return when every process has called it."""
    PartialState().wait_for_everyone()


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The user's own model: without what `prepare`, DistributedDataParallel, DataParallel or FullyShardedDataParallel put around it.

    Args:
        model: prepared or not.
        keep_fp32_wrapper: False: its `forward` is the one from before `convert_outputs_to_fp32`, where `_original_forward` holds that.
        keep_torch_compile: a compiled model stays compiled, around the user's own; False: without that.
        recursive: also in place of its wrapped layers.
    """
    accelerator = jobs.accelerator()
    if accelerator is not None:
        model = accelerator.unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)
    return without_wrappers(
        model, keep_forward=keep_fp32_wrapper, keep_torch_compile=keep_torch_compile, recursive=recursive
    )


def save(obj: Any, f: str | PathLike[str], save_on_each_node: bool = False, safe_serialization: bool = True) -> None:
    """Write a dict of arrays (a state_dict) as one safetensors file, from process 0.

    `safe_serialization` is True by default, which it is not in Accelerate: a pickle runs code when it is loaded, and is refused with
    CheckpointError. Raises UnsupportedError for `save_on_each_node`.
    """
    if save_on_each_node:
        raise UnsupportedError(
            "save_on_each_node=True: process 0 alone writes",
            "write to a folder that all machines see, or copy the file",
        )
    PartialState()
    jobs.accelerator().save(obj, f, safe_serialization)


def merge_dicts(source: Mapping[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """Write `source` into `destination`, dicts within dicts, and return that."""
    for name, value in source.items():
        if isinstance(value, Mapping):
            merge_dicts(value, destination.setdefault(name, {}))
        else:
            destination[name] = value
    return destination


def recursive_getattr(obj: Any, attr: str) -> Any:
    """`obj.a.b` for "a.b"."""
    return functools.reduce(getattr, attr.split("."), obj)


def get_pretty_name(obj: Any) -> str:
    """The name of a class or function, else that of the object's class."""
    named = obj if hasattr(obj, "__qualname__") or hasattr(obj, "__name__") else type(obj)
    return str(getattr(named, "__qualname__", None) or named.__name__)


def convert_bytes(size: float) -> str:
    """A number of bytes for people, in powers of 1024: "1.5 KB"."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} PB"


def is_port_in_use(port: int | str | None = None) -> bool:
    """Whether a server of this machine listens on a port, by default 29500."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(("localhost", 29500 if port is None else int(port))) == 0


def get_free_port() -> int:
    """A port that nobody of this machine listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def check_os_kernel() -> None:
    """Warn of a Linux kernel older than 5.5, on which processes of torch may hang."""
    machine = platform.uname()
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", machine.release)
    if machine.system == "Linux" and found is not None and tuple(map(int, found.groups())) < _OLDEST_KERNEL:
        oldest = ".".join(map(str, _OLDEST_KERNEL))
        log.warning(f"kernel {found[0]} is older than {oldest}, with which processes may hang; a newer one cures that")


def write_basic_config(mixed_precision: str = "no", save_location: str | PathLike[str] | None = None) -> Path | bool:
    """Write a configuration file without asking anything, and return its path; False where a file stands there already.

    Args:
        mixed_precision: "no", "bf16" or "fp16". How many processes there are is found by `polyaccel launch`, as without a file.
        save_location: a .toml file, or one in Accelerate's own keys (.yml, .yaml, .json); None: the user's own file.

    Raises ConfigError for another precision, and where the file cannot be written.
    """
    path = user_config_file() if save_location is None else Path(save_location).expanduser()
    try:
        mixed_precision = SETTINGS["mixed_precision"].check(mixed_precision.lower())
    except ValueError as error:
        raise ConfigError(f"mixed_precision={mixed_precision!r} {error}", "`polyaccel config show` lists it") from error
    if path.exists():
        log.warning("%s stands there already and is left as it is", path)
        return False
    values = {"mixed_precision": mixed_precision}
    if path.suffix.lower() in (".yml", ".yaml", ".json"):
        text = json.dumps({"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", **values}, indent=1) + "\n"
    else:
        text = document(values, title="written by write_basic_config")
    write(path, text)
    return path
