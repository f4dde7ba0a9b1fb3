"""Weights that are not on the device yet: in host memory, or in a safetensors file that is mapped while it is read."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polyaccel.errors import CheckpointError, UnsupportedError
from polyaccel.stored import StoredPiece, StoredWeight
from polyaccel_torch.big_models.tensors import resolve_dtype

INDEX = "index.json"
_SAFETENSORS = ".safetensors"
# Pages that were read count as memory of the process while their file is mapped; after so many, it is mapped anew.
_MAPPED_BYTES = 64 * 2**20


class OpenFiles:
    """Files that are open while weights are read. What was read on the CPU lies in the map, and the map goes with the last of it."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}
        self._given: dict[str, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all; tensors that are still in use keep their part mapped."""
        for path in list(self._open):
            self._close(path)

    def tensor(self, file: str | os.PathLike[str], key: str) -> torch.Tensor:
        """An array of a file, not copied; what is written to it stays in this process. Raises CheckpointError."""
        path = os.fspath(file)
        try:
            if self._given.get(path, 0) > _MAPPED_BYTES:
                self._close(path)
            if path not in self._open:
                is_safetensors = path.endswith(_SAFETENSORS)
                self._open[path] = (
                    safe_open(path, framework="pt") if is_safetensors else _TorchFile(read_torch_file(Path(path)))
                )
                self._given[path] = 0
            found: torch.Tensor = self._open[path].get_tensor(key)
            self._given[path] += found.nbytes
            return found
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} does not give {key!r}: {error}",
                "the file was moved, replaced or damaged; load the model again",
            ) from error

    def _close(self, path: str) -> None:
        self._given.pop(path)
        self._open.pop(path).__exit__(None, None, None)

    def weight(self, weight: StoredWeight) -> torch.Tensor:
        """A whole weight; in memory of its own where it lies in several pieces."""
        first = self.tensor(weight.pieces[0].file, weight.pieces[0].key)
        if len(weight.pieces) == 1:
            return first
        whole = torch.empty(weight.shape, dtype=first.dtype)
        for piece in weight.pieces:
            box = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.shape, strict=True))
            whole[box] = self.tensor(piece.file, piece.key)
        return whole


class _TorchFile(dict[str, torch.Tensor]):
    """A torch file that is used as a safetensors file is."""

    def get_tensor(self, key: str) -> torch.Tensor:
        return self[key]

    def __exit__(self, *_: object) -> None:
        self.clear()


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch's, mapped; nothing that is stored there is run. Raises CheckpointError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a state dict: {error}", "save it as safetensors") from error
    except Exception as error:  # UnpicklingError, whose module may not be imported: the file holds more than tensors
        raise CheckpointError(
            f"{path} holds more than tensors and is not loaded: {error}", "save it as safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is no state dict: it holds more than tensors by name", "save model.state_dict()")
    return dict(found)


def torch_file_weights(path: Path) -> dict[str, StoredWeight]:
    """Where the weights of a torch file lie."""
    return {
        name: StoredWeight(tuple(value.shape), (StoredPiece(path, name, (0,) * value.dim(), tuple(value.shape)),))
        for name, value in read_torch_file(path).items()
    }


def raw_tensor(path: str | os.PathLike[str], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The tensor whose bytes are a whole file, mapped; what is written to it stays in this process. Raises CheckpointError."""
    count = shape.numel()
    try:
        has = Path(path).stat().st_size
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read: {error}", "offload the model again") from error
    if has < count * dtype.itemsize:
        raise CheckpointError(
            f"{os.fspath(path)} has {has} bytes, and {dtype} of shape {list(shape)} {count * dtype.itemsize}",
            "the file was damaged, or its index belongs to another; offload the model again",
        )
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(os.fspath(path), shared=False, size=count, dtype=dtype).reshape(shape)


class Source:
    """A weight that is away. While it is on a device for one module, a module that is tied to it uses the same tensor."""

    def __init__(self) -> None:
        self._live: dict[torch.device, weakref.ref[torch.Tensor]] = {}

    def live(self, device: torch.device | None) -> torch.Tensor | None:
        """What another module has brought there, while it is there."""
        found = None if device is None else self._live.get(device)
        return None if found is None else found()

    def remember(self, tensor: torch.Tensor) -> None:
        """It is on the tensor's device now."""
        self._live[tensor.device] = weakref.ref(tensor)

    def forget(self) -> None:
        """A module that used it is done."""

    def read(self, device: torch.device | None, dtype: torch.dtype, files: OpenFiles) -> torch.Tensor:
        """Its values on a device; None: where they are."""
        raise NotImplementedError

    def write_back(self, value: torch.Tensor) -> None:
        """Keep what a forward wrote to it."""
        raise NotImplementedError


class HostSource(Source):
    """In memory of the host, or of another device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor.detach()

    def read(self, device: torch.device | None, dtype: torch.dtype, files: OpenFiles) -> torch.Tensor:
        return self.tensor.to(device, dtype)

    def write_back(self, value: torch.Tensor) -> None:
        if value.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostSource:
        return HostSource(self.tensor.clone())


class FileSource(Source):
    """In a safetensors file; what a forward writes (running statistics) is in host memory from then on, and not in the file."""

    def __init__(self, file: str, key: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.file, self.key, self.dtype = file, key, dtype
        self._written: torch.Tensor | None = None

    def read(self, device: torch.device | None, dtype: torch.dtype, files: OpenFiles) -> torch.Tensor:
        if self._written is not None:
            return self._written.to(device, dtype, copy=True)
        value = files.tensor(self.file, self.key)
        return value.to(self.dtype or value.dtype).to(device, dtype)

    def write_back(self, value: torch.Tensor) -> None:
        self._written = value.detach().to("cpu", copy=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> FileSource:
        twin = FileSource(self.file, self.key, self.dtype)
        twin._written = None if self._written is None else self._written.clone()
        return twin


class RawSource(FileSource):
    """In a file of its own, of its bytes alone: what Accelerate's offload folders hold."""

    def __init__(self, file: str, dtype: torch.dtype, shape: torch.Size) -> None:
        super().__init__(file, "", dtype)
        self._stored, self._shape = dtype, shape

    def read(self, device: torch.device | None, dtype: torch.dtype, files: OpenFiles) -> torch.Tensor:
        if self._written is not None:
            return super().read(device, dtype, files)
        return raw_tensor(self.file, self._stored, self._shape).to(device, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> RawSource:
        twin = RawSource(self.file, self._stored, self._shape)
        twin._written = None if self._written is None else self._written.clone()
        return twin


def index_entry(file: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """What an offload index says of a weight; Accelerate and transformers read the same form."""
    stored = str(dtype).removeprefix("torch.")
    return {"safetensors_file": str(file.absolute()), "weight_name": key, "dtype": stored, "shape": list(shape)}


def entry_source(
    name: str, entry: Any, shape: torch.Size, files: OpenFiles, folder: str | os.PathLike[str] | None = None
) -> FileSource:
    """The weight that an index entry describes, `<name>.dat` in the folder for one without a file.

    Raises CheckpointError for what is no index, and for another shape.
    """
    if isinstance(entry, Mapping) and folder is not None and entry.get("safetensors_file") is None and "shape" in entry:
        path, stored = Path(folder) / f"{name}.dat", resolve_dtype(entry.get("dtype"))
        if stored is not None and torch.Size(entry["shape"]) == shape:
            raw_tensor(path, stored, shape)
            return RawSource(os.fspath(path), stored, shape)
        raise CheckpointError(
            f"the index in {os.fspath(folder)} gives {name} the shape {entry['shape']}, and the model has {list(shape)}",
            "the folder belongs to another model; use an empty offload folder",
        )
    if not isinstance(entry, Mapping) or not isinstance(entry.get("safetensors_file"), str):
        raise CheckpointError(
            f"the offload index gives {name} no safetensors_file, and no dtype and shape", "offload the model anew"
        )
    source = FileSource(entry["safetensors_file"], entry.get("weight_name", name), resolve_dtype(entry.get("dtype")))
    if not source.file.endswith(_SAFETENSORS):
        raise UnsupportedError(f"{source.file} of {name} is no .safetensors file", "convert it to safetensors")
    found = files.tensor(source.file, source.key).shape
    if found != shape:
        raise CheckpointError(
            f"{source.file} has {source.key!r} of shape {list(found)}, and {name} has {list(shape)}",
            "the folder belongs to another model; use an empty offload folder",
        )
    return source


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The index in a folder of offloaded weights, empty where there is none. Raises CheckpointError for a damaged one."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}", "use an empty offload folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no index of offloaded weights", "use an empty offload folder")
    return found


def add_to_index(folder: str | os.PathLike[str], entries: Mapping[str, Any]) -> None:
    """Add weights to the folder's index, or replace them in it."""
    path = Path(folder) / INDEX
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{INDEX}.{os.getpid()}")
    written.write_text(json.dumps({**read_index(folder), **entries}, indent=1), encoding="utf-8")
    written.replace(path)


def write_weight(folder: str | os.PathLike[str], name: str, value: torch.Tensor) -> dict[str, Any]:
    """Store a weight in a file of its own; returns its index entry. Who has the former file mapped keeps the former values."""
    stem = hashlib.sha256(name.encode("utf-8")).hexdigest()[:20]  # any name makes a file name
    path = Path(folder) / f"{stem}{_SAFETENSORS}"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: value.detach().to("cpu").contiguous()}, written)
    written.replace(path)
    return index_entry(path, name, value.dtype, tuple(value.shape))
