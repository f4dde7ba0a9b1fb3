"""Where each weight of a checkpoint lies, of any layout, without reading one: for models that are loaded a weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from polyaccel.checkpoint import names
from polyaccel.checkpoint.documents import Malformed, mapping, strict_json, text
from polyaccel.checkpoint.dtypes import STORED
from polyaccel.checkpoint.formats.mapped import read_tensors
from polyaccel.checkpoint.read import open_checkpoint
from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredPiece, StoredWeight

_MODEL = "model"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
Weights = dict[str, StoredWeight]
ReadTorchFile = Callable[[Path], Weights]


def locate_weights(path: Path, read_torch_file: ReadTorchFile) -> Weights:
    """Every weight by name. `read_torch_file` knows files that are not safetensors.

    `path` is a safetensors or torch file, an index of several, a folder with either, or a checkpoint of `save_state`, of which the
    group `model` is taken; its checksums are not compared (`polyaccel checkpoint verify` does that). Raises CheckpointError.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}", "give a weights file, its index, or the folder that holds them")
    if path.is_dir():
        return _in_folder(path, read_torch_file)
    if path.suffix == ".json":
        return _indexed(path, read_torch_file)
    return _in_file(path, read_torch_file)


def _in_folder(folder: Path, read_torch_file: ReadTorchFile) -> Weights:
    if (folder / names.MANIFEST).is_file():
        return _saved_by_us(folder)
    for name in _WHOLE:
        if (folder / name).is_file():
            return _in_file(folder / name, read_torch_file)
    found = sorted(file for file in folder.iterdir() if file.name.endswith(_INDEX))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or f"none of {', '.join(_WHOLE)}, *{_INDEX}, {names.MANIFEST}"
        raise CheckpointError(f"{folder} has {listed}", "give the file of the weights, or the one index, itself")
    return _indexed(found[0], read_torch_file)


def _in_file(file: Path, read_torch_file: ReadTorchFile) -> Weights:
    if file.suffix != ".safetensors":
        return read_torch_file(file)
    return {
        name: StoredWeight(array.shape, (StoredPiece(file, name, (0,) * len(array.shape), array.shape),))
        for name, array in read_tensors(file).items()
    }


def _indexed(index: Path, read_torch_file: ReadTorchFile) -> Weights:
    try:
        fields = mapping(strict_json(index.read_bytes()), "the index")
        files = mapping(fields.get("weight_map", fields), "weight_map")
        wanted = {name: text(file, f"the file of {name:.200}") for name, file in files.items()}
        strays = [file for file in wanted.values() if not names.is_safe(file)]
        if strays:
            raise Malformed(f"it names {strays[0]!r:.200}, which is not beside it")
    except (Malformed, OSError) as error:
        raise CheckpointError(f"{index} is no index of weights: {error}", "take another copy of it") from error
    held = {file: _in_file(index.parent / file, read_torch_file) for file in dict.fromkeys(wanted.values())}
    for name, file in wanted.items():
        if name not in held[file]:
            raise CheckpointError(f"{index} says that {file} has {name!r:.200}, and it has not", "take another copy")
    return {name: held[file][name] for name, file in wanted.items()}


def _saved_by_us(folder: Path) -> Weights:
    saved = open_checkpoint(folder, verify=False)
    saved.arrays(_MODEL)  # names the groups that are there, where this one is not
    found: Weights = {}
    for name, array in saved.manifest.groups[_MODEL].items():
        if STORED[array.dtype].name == "U8" and array.dtype != "uint8":
            raise CheckpointError(
                f"{folder}: {name} has dtype {array.dtype}, which safetensors has not", "save it in another dtype"
            )
        pieces = tuple(StoredPiece(folder / piece.file, piece.key, piece.offset, piece.shape) for piece in array.pieces)
        found[name] = StoredWeight(array.shape, pieces)
    return found
