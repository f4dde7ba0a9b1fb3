"""Folders of torch.distributed.checkpoint (DCP): their index is read as data (`pickled_data`), each chunk with `weights_only=True`.

Writing goes through DCP's own planner and writer, which ask for one tensor at a time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredArray
from polyaccel_torch.files.pickled_data import Pickled, read_pickle
from polyaccel_torch.files.torch_file import from_torch, import_torch

INDEX = ".metadata"
_DEEPEST = 64  # levels of a tree
_CLASSES = "torch.distributed.checkpoint.metadata."


class DcpFiles:
    """Checkpoint folders of `torch.distributed.checkpoint.save`, as trees."""

    name = "dcp"

    def read(self, path: Path) -> Any:
        """The saved state_dict, nested as it was. Tensors of any sharding are put together when they are read."""
        import_torch()
        try:
            return _tree(_record(read_pickle((path / INDEX).read_bytes()), "Metadata", path), path)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{path / INDEX} cannot be read: {error.strerror}", "check its permissions"
            ) from error
        except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{path / INDEX} is damaged: {error}", "take another copy of the checkpoint"
            ) from error

    def write(self, path: Path, tree: Any) -> None:
        """Write the tree as a state_dict that `dcp.load` reads: one process, one file, flushed to the disk."""
        import_torch()
        from polyaccel_torch.files.dcp_writer import save

        save(path, tree)


def _tree(index: Pickled, path: Path) -> Any:
    entries = index.attribute("state_dict_metadata")
    chunks = _chunks(index, path)
    paths = index.attribute("planner_data") or {}
    tree: dict[Any, Any] = {}
    for key, entry in entries.items():
        value = (
            _tensor(key, entry, chunks.get(key, {}), path)
            if entry.name == f"{_CLASSES}TensorStorageMetadata"
            else _value(key, chunks.get(key, {}), path)
        )
        _insert(tree, _place(paths.get(key, (key,))), value)
    return _with_lists(tree)


def _place(path: Any) -> tuple[Any, ...]:
    if (
        not isinstance(path, tuple)
        or not 0 < len(path) <= _DEEPEST
        or not all(type(part) in (str, int) for part in path)
    ):
        raise ValueError(f"an array stands at {path!r:.100}")
    return path


def _record(value: Any, name: str, path: Path) -> Pickled:
    if isinstance(value, Pickled) and value.name == _CLASSES + name and isinstance(value.state, dict):
        return value
    found = value.name if isinstance(value, Pickled) else type(value).__name__
    raise CheckpointError(
        f"{path / INDEX} holds a {found} where DCP has its {name}", "give a folder that dcp.save wrote"
    )


def _chunks(index: Pickled, path: Path) -> dict[str, dict[tuple[int, ...] | None, Pickled]]:
    """By key and offset, where the bytes of each chunk are."""
    found: dict[str, dict[tuple[int, ...] | None, Pickled]] = {}
    for place, info in index.attribute("storage_data"):
        file = info.attribute("relative_path")
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise CheckpointError(
                f"{path / INDEX} names {file!r}, which is no file of the folder", "do not trust this checkpoint"
            )
        if info.attribute("transform_descriptors"):
            raise CheckpointError(
                f"{path / file} was written through stream transforms ({info.attribute('transform_descriptors')})",
                "save it again without extensions",
            )
        offset = place.attribute("offset")
        found.setdefault(place.attribute("fqn"), {})[None if offset is None else _size(offset)] = info
    return found


def _size(value: Any) -> tuple[int, ...]:
    sizes = value.arguments[0] if isinstance(value, Pickled) and value.name == "torch.Size" else value
    if not isinstance(sizes, (tuple, list)) or not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"a shape in the index is {sizes!r}", "take another copy of the checkpoint")
    return tuple(sizes)


def _tensor(key: str, entry: Pickled, chunks: dict[tuple[int, ...] | None, Pickled], path: Path) -> StoredArray:
    shape = _size(entry.attribute("size"))
    dtype = entry.attribute("properties").state[0].name.removeprefix("torch.")
    pieces = [
        (_size(chunk.attribute("offsets")), _size(chunk.attribute("sizes"))) for chunk in entry.attribute("chunks")
    ]
    _check_complete(key, shape, pieces, path)

    def read() -> Any:
        import numpy as np

        from polyaccel_torch.files.host_arrays import to_host

        whole = None
        for offset, size in pieces:
            info = chunks.get(offset, chunks.get(None))
            if info is None:
                raise CheckpointError(
                    f"{path}: {key} lacks its chunk at {offset}", "take another copy of the checkpoint"
                )
            data = to_host(_load(info, path))
            if data.shape != size:
                raise CheckpointError(
                    f"{path}: {key} has a chunk of shape {data.shape} where the index says {size}",
                    "take another copy of the checkpoint",
                )
            if size == shape:
                return data
            whole = np.empty(shape, data.dtype) if whole is None else whole
            whole[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))] = data
        return whole

    return StoredArray(dtype, shape, read)


def _check_complete(key: str, shape: tuple[int, ...], pieces: list[Any], path: Path) -> None:
    inside = all(
        len(offset) == len(size) == len(shape) and all(o + s <= n for o, s, n in zip(offset, size, shape, strict=True))
        for offset, size in pieces
    )
    filled = sum(math.prod(size) for _, size in pieces)
    if not inside or len({offset for offset, _ in pieces}) < len(pieces) or filled != math.prod(shape):
        raise CheckpointError(
            f"{path}: the chunks of {key} do not make up its shape {shape}", "take another copy of the checkpoint"
        )


def _value(key: str, chunks: dict[tuple[int, ...] | None, Pickled], path: Path) -> Any:
    if len(chunks) != 1:
        raise CheckpointError(f"{path}: the bytes of {key} are missing", "take another copy of the checkpoint")
    return from_torch(_load(next(iter(chunks.values())), path), key)


def _load(info: Pickled, path: Path) -> Any:
    import io

    torch = import_torch()
    file, offset, length = path / info.attribute("relative_path"), info.attribute("offset"), info.attribute("length")
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}", "take another copy of the checkpoint"
        ) from error
    with open(descriptor, "rb") as stream:
        stream.seek(offset)
        data = stream.read(length)
    if len(data) < length:
        raise CheckpointError(
            f"{file} ends {length - len(data)} bytes too early", "take another copy of the checkpoint"
        )
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as data: torch.load(weights_only=True) refuses it ({str(error).splitlines()[0]:.300})",
            "save the checkpoint again from plain containers of tensors",
        ) from error


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """DCP numbers the items of a list; a dict's keys are always strings."""
    if not isinstance(tree, dict):
        return tree
    items = {key: _with_lists(value) for key, value in tree.items()}
    if items and all(type(key) is int for key in items):
        return [items[position] for position in sorted(items)]
    return items
