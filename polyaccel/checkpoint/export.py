"""A model's weights as other libraries read them: safetensors files that transformers and safetensors know, written by the main process.

Files are complete under another name before the first old one goes, and the index is removed first and written last: a reader finds the
old weights, the new ones, or an error, never a mixture.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.array_values import take_arrays
from polyaccel.checkpoint.dtypes import STORED, empty, to_bytes
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.checkpoint.pieces import why_not_whole
from polyaccel.checkpoint.storage import is_url
from polyaccel.checkpoint.tensor_file import METADATA, Tensor, layout
from polyaccel.dialects import identify
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS_FILE = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

_FRAMEWORKS = {"torch": "pt", "flax": "flax"}
_PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})

Gather = Callable[[Any], list[Any]]  # the values of all processes, in process order


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file to be written, and the arrays in it."""

    name: str
    arrays: tuple[str, ...]


def require_safe(safe_serialization: bool) -> None:
    """Raises CheckpointError where pickled files are asked for."""
    if not safe_serialization:
        raise CheckpointError(
            "safe_serialization=False asks for pickled files, which run code when they are loaded",
            "leave it out: everything is written as safetensors and JSON",
        )


def metadata_of(model: Any) -> dict[str, str]:
    """What the header of a weights file says about who can read it, as transformers writes it."""
    dialect = (identify(model) or ("",))[0]
    return {"format": _FRAMEWORKS.get(dialect, "np")}


def save_arrays(values: Any, file: str | os.PathLike[str]) -> None:
    """Write arrays of any framework by name as one safetensors file; what stood there before is replaced when it is complete.

    Raises CheckpointError for anything else than a dict of arrays, and for a name that promises a pickle.
    """
    path = Path(file)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is named like a pickled file, and nothing is pickled here",
            f"call it {path.with_suffix('.safetensors').name}, or call torch.save yourself on the main process",
        )
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(
            f"accelerator.save takes a dict of arrays by name, not a {type(values).__name__}",
            "save everything that a run remembers with save_state, after register_for_checkpointing for your own objects",
        )
    tensors: list[Tensor] = []
    for name, value in values.items():
        held: list[Shard] = []
        take_arrays(value, name, held)
        if len(held) != 1 or held[0].name != name.removeprefix("."):
            raise CheckpointError(
                f"accelerator.save: {name!r} is a {type(value).__name__}, no array", "leave it out, or use save_state"
            )
        check_dtype(name, held[0].dtype)
        tensors.append(Tensor(name, held[0].dtype, tuple(held[0].data.shape), to_bytes(held[0], name)))
    hidden = _hidden(path.parent, path.name)
    hidden.unlink(missing_ok=True)
    try:
        LocalFolder(path.parent).write(hidden.name, layout(tensors, {"format": "pt"}))
        hidden.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", "see that its folder is there and has space"
        ) from error
    finally:
        hidden.unlink(missing_ok=True)


def parse_size(size: int | str) -> int:
    """Bytes: `10GB` (powers of 1000), `10GiB` (powers of 1024), or a number. Raises CheckpointError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None or not float(found[1]):
        raise CheckpointError(
            f"max_shard_size={size!r} is no size", "write it as '10GB', '500MB' or '1GiB', or as a number of bytes"
        )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])


def plan_files(sizes: Mapping[str, int], max_shard_size: int, weights: str = WEIGHTS) -> list[WeightsFile]:
    """The arrays in their order, a new file where one would grow past the limit; an array above it has a file of its own."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem = weights.removesuffix(".safetensors")
    total = len(groups)
    if total <= 1:
        return [WeightsFile(weights, tuple(sizes))]
    return [
        WeightsFile(f"{stem}-{number:05d}-of-{total:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def export_weights(
    pieces: Iterable[Shard],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    gather: Gather,
    process_index: int,
) -> None:
    """Write the weights whose pieces the processes hold to `folder`, from process 0. Every process must call it.

    No process but 0 writes, and none holds more than its own pieces and one array; process 0 holds one file's arrays. Raises
    CheckpointError on every process where the folder cannot be written or the pieces are not whole arrays.
    """
    limit = parse_size(max_shard_size)
    if is_url(folder):
        raise CheckpointError(f"weights cannot be written to {folder}", "save them to a local folder and copy that")
    own: dict[str, list[Shard]] = {}
    for piece in pieces:
        own.setdefault(piece.name, []).append(piece)
    facts = [
        (name, piece.dtype, list(piece.global_shape), list(piece.offset), list(piece.data.shape))
        for name, parts in own.items()
        for piece in parts
    ]
    arrays = _described(gather(facts))
    files = plan_files({name: prod(a.shape) * STORED[a.dtype].size for name, a in arrays.items()}, limit)
    writer = _Writer(Path(folder)) if process_index == 0 else None
    for file in files:
        for name in file.arrays:
            parts = own.pop(name, [])
            if arrays[name].is_elsewhere:
                parts = _all_pieces(gather([(list(p.offset), p.data) for p in parts]), name, arrays[name])
            if writer is not None:
                writer.add(name, arrays[name], parts)
        if writer is not None:
            writer.write(file.name, metadata)
    if writer is not None:
        writer.finish(files, sum(prod(a.shape) * STORED[a.dtype].size for a in arrays.values()))
    failure = gather(writer.failure if writer is not None else None)[0]
    if failure:
        raise CheckpointError(*failure)


@dataclass(slots=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    is_elsewhere: bool = False  # some piece is not process 0's


def _described(facts: Sequence[Sequence[Any]]) -> dict[str, _Array]:
    arrays: dict[str, _Array] = {}
    for process, parts in enumerate(facts):
        for name, dtype, shape, offset, size in parts:
            array = arrays.setdefault(name, _Array(dtype, tuple(shape), []))
            if (array.dtype, array.shape) != (dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name!r} is {array.dtype} of shape {array.shape} on one process and {dtype} of shape {tuple(shape)} on another",
                    "build the same model on every process",
                )
            array.boxes.append((tuple(offset), tuple(size)))
            array.is_elsewhere |= process > 0
    for name, array in arrays.items():
        check_dtype(name, array.dtype)
        reason = why_not_whole(array.shape, array.boxes)
        if reason:
            raise CheckpointError(f"{name!r} is not whole: {reason}", "this is a defect of the engine that gave it")
    return arrays


def check_dtype(name: str, dtype: str) -> None:
    """Raises CheckpointError for a name or dtype that the safetensors format has not."""
    stored = STORED.get(dtype)
    if stored is None or (stored.name == "U8" and dtype != "uint8"):
        raise CheckpointError(
            f"{name!r} has dtype {dtype}, which safetensors files cannot hold", "convert it, or leave it out"
        )
    if name == METADATA:
        raise CheckpointError(f"an array is called {name!r}, which safetensors keeps for itself", "rename it")


def _all_pieces(gathered: Sequence[Any], name: str, array: _Array) -> list[Shard]:
    return [Shard(name, array.shape, tuple(offset), array.dtype, data) for parts in gathered for offset, data in parts]


def _whole(name: str, array: _Array, parts: list[Shard]) -> Tensor:
    if len(parts) == 1:
        return Tensor(name, array.dtype, array.shape, to_bytes(parts[0], "model"))
    import numpy as np

    whole = empty(array.dtype, array.shape)
    for part in parts:
        where = tuple(slice(start, start + size) for start, size in zip(part.offset, part.data.shape, strict=True))
        whole[where] = np.asarray(part.data).view(whole.dtype)
    return Tensor(name, array.dtype, array.shape, whole.reshape(-1).view(np.uint8).data)


class _Writer:
    """Process 0's side: what fails is kept and told to all at the end, so that nobody waits for a process that has left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: list[Tensor] = []
        self._done: list[str] = []
        self.failure: tuple[str, str | None] | None = None

    def add(self, name: str, array: _Array, parts: list[Shard]) -> None:
        self._attempt(lambda: self._tensors.append(_whole(name, array, parts)))

    def write(self, name: str, metadata: Mapping[str, str]) -> None:
        self._attempt(lambda: self._write(name, metadata))
        self._tensors.clear()

    def finish(self, files: Sequence[WeightsFile], num_bytes: int) -> None:
        self._attempt(lambda: self._finish(files, num_bytes))
        if self.failure:
            for name in (*self._done, INDEX):
                with suppress(OSError):  # the reason for the failure is on its way
                    _hidden(self._folder, name).unlink()

    def _attempt(self, action: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            action()
        except CheckpointError as error:
            self.failure = (error.message, error.hint)
        except OSError as error:
            self.failure = (
                f"the weights cannot be written to {self._folder}: {error}",
                "choose a folder with space that this process may write to",
            )

    def _write(self, name: str, metadata: Mapping[str, str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._done.append(name)
        self._write_hidden(name, layout(self._tensors, metadata))

    def _finish(self, files: Sequence[WeightsFile], num_bytes: int) -> None:
        (self._folder / INDEX).unlink(missing_ok=True)
        for name in self._done:
            _hidden(self._folder, name).replace(self._folder / name)
        if len(files) > 1:
            self._write_hidden(INDEX, [memoryview(index_of(files, num_bytes))])
            _hidden(self._folder, INDEX).replace(self._folder / INDEX)
        for stale in self._folder.iterdir():  # of a larger model, or of a save that was cut off
            name = stale.name.removeprefix(".").removesuffix(".saving")
            if _WEIGHTS_FILE.fullmatch(name) and stale.name not in self._done:
                stale.unlink()
        sync_folder(self._folder)

    def _write_hidden(self, name: str, buffers: Iterable[memoryview]) -> None:
        _hidden(self._folder, name).unlink(missing_ok=True)
        LocalFolder(self._folder).write(_hidden(self._folder, name).name, buffers)


def _hidden(folder: Path, name: str) -> Path:
    return folder / f".{name}.saving"


def index_of(files: Sequence[WeightsFile], num_bytes: int) -> bytes:
    """The index that says which file has which array."""
    where = {name: file.name for file in files for name in file.arrays}
    return (json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": where}, indent=2) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
