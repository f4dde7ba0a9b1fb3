"""Hugging Face's layout: a model's weights in safetensors files, with an index where there are several. Nothing else has a place."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.dtypes import STORED, to_bytes
from polyaccel.checkpoint.export import INDEX, check_dtype, index_of, parse_size, plan_files
from polyaccel.checkpoint.formats.bundle import Arrays, Bundle, Choices, the_model
from polyaccel.checkpoint.formats.mapped import read_tensors
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.checkpoint.names import is_safe
from polyaccel.checkpoint.tensor_file import Tensor, layout
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel.stored import Spool, StoredArray

_MAX_FILE = "10GB"


def recognizes(path: Path) -> bool:
    """A safetensors file, or a folder with an index or with one such file."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return bool(_weights_files(path))


def read(path: Path, choices: Choices) -> Bundle:
    """The weights as group `model`. Other files of the folder (config.json, a tokenizer) are no part of a checkpoint."""
    if path.is_file():
        return Bundle({"model": read_tensors(path)})
    files = [file for file in _weights_files(path) if file.name not in choices.skip]
    if (path / INDEX).is_file():
        return Bundle({"model": _indexed(path)})
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(
            f"{path} has {names or 'no safetensors file'} and no {INDEX}",
            f"give the file itself: {files[0]}" if files else "give a folder that save_pretrained or save_model wrote",
        )
    return Bundle({"model": read_tensors(files[0])})


def write(path: Path, bundle: Bundle) -> None:
    """The weights of the one model that is there. Raises CheckpointError for a dtype that safetensors has not."""
    arrays = the_model(bundle, path, "Hugging Face's layout")
    sizes = {}
    for name, array in arrays.items():
        check_dtype(name, array.dtype)
        sizes[name] = prod(array.shape) * STORED[array.dtype].size
    files = plan_files(sizes, parse_size(_MAX_FILE))
    path.mkdir()
    with Spool(path.parent) as spool:
        for file in files:
            write_tensors(path / file.name, {name: arrays[name] for name in file.arrays}, spool)
    if len(files) > 1:
        LocalFolder(path).write(INDEX, [memoryview(index_of(files, sum(sizes.values())))])
    bundle.left_behind += [group for group in bundle.groups if bundle.groups[group] is not arrays]
    bundle.left_behind += ["plain values"] if bundle.shared or any(bundle.own) else []


def write_tensors(path: Path, arrays: Arrays, spool: Spool) -> None:
    """One safetensors file that torch's libraries take, on the disk when this returns."""
    tensors = [Tensor(name, array.dtype, array.shape, _bytes(name, array, spool)) for name, array in arrays.items()]
    LocalFolder(path.parent).write(path.name, layout(tensors, {"format": "pt"}))


def _bytes(name: str, array: StoredArray, spool: Spool) -> memoryview:
    data = spool.keep(array.read())
    return to_bytes(Shard(name, array.shape, (0,) * len(array.shape), array.dtype, data), "model")


def _weights_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _indexed(path: Path) -> Arrays:
    where = _weight_map(path / INDEX)
    found = {file: read_tensors(path / file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in found[file]:
            raise CheckpointError(
                f"{path / INDEX} says that {file} has {name!r}, which it has not", "take another copy of it"
            )
    return {name: found[file][name] for name, file in where.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where: Any = json.loads(index.read_text("utf-8"))["weight_map"]
        items = dict(where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}", "take another copy of it") from error
    for name, file in items.items():
        if not isinstance(file, str) or "/" in file or not is_safe(file):
            raise CheckpointError(
                f"{index} puts {name!r} into {file!r}, which is no file of the folder", "do not trust it"
            )
    return items
