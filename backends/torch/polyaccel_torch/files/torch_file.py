"""Single files of `torch.save`: read with `weights_only=True` and mapped into memory, written of plain containers and tensors alone."""

from __future__ import annotations

import importlib.util
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from polyaccel.errors import BackendUnavailableError, CheckpointError
from polyaccel.stored import StoredArray


class TorchFiles:
    """What `torch.save` writes (`.bin`, `.pt`, `.pth`, `.pkl`), as trees."""

    name = "torch"

    def read(self, path: Path) -> Any:
        """The tree in a file; its arrays stay in the file until they are read. Raises CheckpointError naming what is no data."""
        torch = import_torch()
        try:
            with _array_globals(torch):
                value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}", "check the path and its permissions") from error
        except Exception as error:
            reason = next(
                (line for line in str(error).splitlines() if "Unsupported" in line), str(error).split("\n")[0]
            )
            raise CheckpointError(
                f"{path} cannot be read as data: torch.load(weights_only=True) refuses it ({reason.strip():.300})",
                f"leave it out with --skip {path.name}, or load it yourself, where you trust it, and save plain containers of tensors",
            ) from error
        return from_torch(value, path.name)

    def write(self, path: Path, tree: Any) -> None:
        """Write the tree so that `torch.load(path, weights_only=True)` gives it; tensors that a file holds are mapped, not copied."""
        torch = import_torch()
        value = to_torch(tree, path.name)
        torch.save(value, path)


def import_torch() -> Any:
    """torch. Raises BackendUnavailableError where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError(
            "torch's files need torch, which is not installed", "pip install 'polyaccel[torch]'"
        )
    import torch

    return torch


def from_torch(value: Any, where: str) -> Any:
    """Tensors and numpy arrays as stored arrays, numpy numbers as Python's; containers stay. Raises CheckpointError for anything else."""
    import numpy as np
    import torch

    from polyaccel_torch.files.host_arrays import store

    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{where} is a sparse or quantized tensor", "save it as a dense tensor")
        return store(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return StoredArray(value.dtype.name, value.shape, lambda: value, "numpy")
    if isinstance(value, np.generic):
        return value.item()
    return _mapped(value, where, from_torch)


def to_torch(value: Any, where: str) -> Any:
    """Stored arrays as tensors, numpy numbers as Python's; containers stay. Raises CheckpointError for anything else."""
    from polyaccel_torch.files.host_arrays import load

    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, StoredArray):
        # jax's arrays cannot be in a file of torch's; numpy's can, and numpy's own generator is kept in one.
        return load(value, where) if value.kind == "torch" else _plain(value)
    return _mapped(value, where, to_torch)


def _plain(array: StoredArray) -> Any:
    import numpy as np

    data = np.asarray(array.read())
    if data.dtype.name == array.dtype:
        return data
    raise CheckpointError(f"an array of dtype {array.dtype} is no array that numpy has", "keep it as a torch tensor")


def _mapped(value: Any, where: str, one: Callable[[Any, str], Any]) -> Any:
    if type(value) is Counter:  # milestones of a scheduler
        return Counter(value)
    if isinstance(value, Mapping):
        return {_key(key, where): one(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [one(item, f"{where}[{position}]") for position, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else set(items)
    kind = type(value)
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which is no plain data",
        "save numbers, strings, tensors, or lists, tuples and dicts of them",
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, (str, int, float, bool, tuple)) or key is None:
        return key
    raise CheckpointError(f"{where} has a key of type {type(key).__name__}", "use strings and numbers as keys")


def _array_globals(torch: Any) -> AbstractContextManager[Any]:
    # What numpy's own arrays and numbers are made of in a pickle: Accelerate stores numpy's generator this way. They build values only.
    import numpy as np

    makers: list[Any] = [np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    older = [(maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers]  # as numpy 1 calls them
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"]
    allowed = [*makers, *older, np.ndarray, np.dtype, *kinds]
    return torch.serialization.safe_globals(allowed)
