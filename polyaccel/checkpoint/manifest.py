"""The manifest: what is in a checkpoint, where, and what its bytes must hash to. Read with a check of everything it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from polyaccel.checkpoint import documents, names
from polyaccel.checkpoint.documents import Malformed, extents, mapping, record, sequence, text, whole
from polyaccel.checkpoint.dtypes import STORED
from polyaccel.checkpoint.pieces import Piece, why_not_whole
from polyaccel.checkpoint.values import pack, unpack

FORMAT = "polyaccel checkpoint"
VERSION = 1
_PART_FORMAT = "part of a polyaccel checkpoint"
_DIGEST = re.compile(r"[0-9a-f]{32}")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size and checksum of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ArrayFacts:
    """One array of a group: dtype name of the seam, global shape, and the pieces that make it up."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Groups = dict[str, dict[str, ArrayFacts]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says about itself.

    `files` are all files beside the manifest, those that hooks have added included; `facts` is what the run said (step, engine,
    mesh, versions, configuration without secrets); `own[i]` are the values of process i.
    """

    attempt: str
    created: float
    facts: dict[str, Any]
    files: dict[str, FileFacts]
    groups: Groups
    shared: dict[str, Any]
    own: tuple[dict[str, Any], ...]

    @property
    def num_processes(self) -> int:
        """How many processes wrote it."""
        return len(self.own)

    @property
    def added(self) -> tuple[str, ...]:
        """Files that belong to no group: a hook has put them there."""
        data_files = self.data_files
        return tuple(name for name in self.files if name not in data_files)

    @property
    def data_files(self) -> frozenset[str]:
        """Files in which arrays of groups lie."""
        arrays = (array for group in self.groups.values() for array in group.values())
        return frozenset(piece.file for array in arrays for piece in array.pieces)


@dataclass(frozen=True, slots=True)
class Part:
    """What one process has written. `failure`: it could not, and why."""

    attempt: str
    files: dict[str, FileFacts]
    groups: Groups
    own: dict[str, Any]
    failure: str | None = None


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    return documents.encode(
        {
            "format": FORMAT,
            "version": VERSION,
            "attempt": manifest.attempt,
            "created": manifest.created,
            "num_processes": manifest.num_processes,
            "facts": pack(manifest.facts, "facts"),
            "files": _files_out(manifest.files),
            "groups": _groups_out(manifest.groups),
            "shared": pack(manifest.shared, "shared"),
            "own": [pack(own, f"own[{index}]") for index, own in enumerate(manifest.own)],
        }
    )


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in these bytes; what it says fits together. Raises Malformed."""
    fields = documents.decode(data)
    if fields.get("format") != FORMAT:
        raise Malformed(f"its format is {fields.get('format')!r:.60}, not {FORMAT!r}")
    if whole(fields.get("version"), "version") != VERSION:
        raise Malformed(f"its version is {fields.get('version')!r:.40}; this polyaccel reads version {VERSION}")
    wanted = {
        "checksum",
        "format",
        "version",
        "attempt",
        "created",
        "num_processes",
        "facts",
        "files",
        "groups",
        "shared",
        "own",
    }
    record(fields, "the manifest", wanted - {"checksum"})
    created = fields["created"]
    if type(created) not in (int, float) or not 0 <= created < 2**62:
        raise Malformed(f"created is {created!r:.40}, no time")
    own = tuple(_values_in(item, f"own[{index}]") for index, item in enumerate(sequence(fields["own"], "own")))
    if not own or len(own) != whole(fields["num_processes"], "num_processes"):
        raise Malformed(f"num_processes is {fields['num_processes']!r:.40}, and the values of {len(own)} are there")
    manifest = Manifest(
        attempt=_attempt_in(fields["attempt"]),
        created=float(created),
        facts=_values_in(fields["facts"], "facts"),
        files=_files_in(fields["files"]),
        groups=_groups_in(fields["groups"]),
        shared=_values_in(fields["shared"], "shared"),
        own=own,
    )
    _check_fit(manifest)
    return manifest


def encode_part(part: Part) -> bytes:
    """The bytes of a part file."""
    return documents.encode(
        {
            "format": _PART_FORMAT,
            "version": VERSION,
            "attempt": part.attempt,
            "files": _files_out(part.files),
            "groups": _groups_out(part.groups),
            "own": pack(part.own, "own"),
            "failure": part.failure,
        }
    )


def decode_part(data: bytes) -> Part:
    """The part in these bytes. Raises Malformed."""
    fields = record(
        documents.decode(data), "the part", {"format", "version", "attempt", "files", "groups", "own", "failure"}
    )
    if fields["format"] != _PART_FORMAT or fields["version"] != VERSION:
        raise Malformed(f"it is of format {fields['format']!r:.60}, version {fields['version']!r:.40}")
    return Part(
        _attempt_in(fields["attempt"]),
        _files_in(fields["files"]),
        _groups_in(fields["groups"]),
        _values_in(fields["own"], "own"),
        None if fields["failure"] is None else text(fields["failure"], "failure"),
    )


def why_not_complete(groups: Groups) -> str | None:
    """The first array whose pieces are not exactly the array, and why; None where all are whole."""
    for group, arrays in groups.items():
        for name, array in arrays.items():
            why = why_not_whole(array.shape, [(piece.offset, piece.shape) for piece in array.pieces])
            if why:
                return f"{group}: {name!r:.200}: {why}"
    return None


def _check_fit(manifest: Manifest) -> None:
    """Pieces are whole arrays, lie in files that are listed, and no two are the same bytes; the bytes of files suffice for them."""
    why = why_not_complete(manifest.groups)
    if why:
        raise Malformed(why)
    claimed = dict.fromkeys(manifest.files, 0)
    keys: set[tuple[str, str]] = set()
    for group, arrays in manifest.groups.items():
        for name, array in arrays.items():
            for piece in array.pieces:
                if piece.file not in claimed:
                    raise Malformed(f"{group}: {name!r:.200} lies in {piece.file!r}, which is not listed")
                if (piece.file, piece.key) in keys:
                    raise Malformed(
                        f"{group}: {name!r:.200} is stored where another piece is: {piece.file} {piece.key!r:.200}"
                    )
                keys.add((piece.file, piece.key))
                claimed[piece.file] += prod(piece.shape) * STORED[array.dtype].size
    for file, size in claimed.items():
        if size > manifest.files[file].bytes:
            raise Malformed(f"{file} has {manifest.files[file].bytes} bytes, and its arrays need {size}")


def _files_out(files: Mapping[str, FileFacts]) -> dict[str, Any]:
    return {name: {"bytes": facts.bytes, "xxh3_128": facts.xxh3_128} for name, facts in sorted(files.items())}


def _files_in(value: Any) -> dict[str, FileFacts]:
    files = {}
    for name, facts in mapping(value, "files").items():
        if not names.is_safe(name) or name == names.MANIFEST or names.is_part(name):
            raise Malformed(f"{name!r:.200} cannot be a file of a checkpoint")
        record(facts, f"files[{name!r:.80}]", {"bytes", "xxh3_128"})
        if not _DIGEST.fullmatch(text(facts["xxh3_128"], "xxh3_128")):
            raise Malformed(f"the checksum of {name!r:.80} is none")
        files[name] = FileFacts(whole(facts["bytes"], "bytes"), facts["xxh3_128"])
    return files


def _groups_out(groups: Groups) -> dict[str, Any]:
    return {
        group: {
            name: {
                "dtype": array.dtype,
                "shape": list(array.shape),
                "pieces": [
                    {"file": piece.file, "key": piece.key, "offset": list(piece.offset), "shape": list(piece.shape)}
                    for piece in array.pieces
                ],
            }
            for name, array in arrays.items()
        }
        for group, arrays in groups.items()
    }


def _groups_in(value: Any) -> Groups:
    groups: Groups = {}
    for group, arrays in mapping(value, "groups").items():
        if not names.is_group(group):
            raise Malformed(f"{group!r:.80} cannot be a group")
        where = f"groups.{group}"
        groups[group] = {
            name: _array_in(array, f"{where}[{name!r:.80}]") for name, array in mapping(arrays, where).items()
        }
    return groups


def _array_in(value: Any, where: str) -> ArrayFacts:
    fields = record(value, where, {"dtype", "shape", "pieces"})
    if text(fields["dtype"], f"{where}.dtype") not in STORED:
        raise Malformed(f"{where} has dtype {fields['dtype']!r:.40}, which checkpoints cannot hold")
    pieces = []
    for value in sequence(fields["pieces"], f"{where}.pieces"):
        piece = record(value, f"a piece of {where}", {"file", "key", "offset", "shape"})
        if not names.is_data_file(text(piece["file"], f"{where}.file")):
            raise Malformed(f"{where} lies in {piece['file']!r:.200}, which cannot be a file of arrays")
        offset, shape = extents(piece["offset"], f"{where}.offset"), extents(piece["shape"], f"{where}.shape")
        pieces.append(Piece(piece["file"], text(piece["key"], f"{where}.key"), offset, shape))
    shape = extents(fields["shape"], f"{where}.shape")
    if prod(max(length, 1) for length in shape) >= 2**62:
        raise Malformed(f"{where} has shape {list(shape)!s:.80}, which is too large to be true")
    return ArrayFacts(fields["dtype"], shape, tuple(pieces))


def _values_in(value: Any, where: str) -> dict[str, Any]:
    try:
        found = unpack(value)
    except ValueError as error:
        raise Malformed(f"{where}: {error}") from None
    return mapping(found, where)


def _attempt_in(value: Any) -> str:
    if not _ATTEMPT.fullmatch(text(value, "attempt")):
        raise Malformed(f"attempt is {value!r:.40}")
    return str(value)
