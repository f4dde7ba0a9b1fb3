"""Opens a checkpoint: everything about it is checked before the first array is handed out, and nothing outside its folder is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from polyaccel.checkpoint import names
from polyaccel.checkpoint.documents import MAX_BYTES, Malformed
from polyaccel.checkpoint.dtypes import STORED, empty
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.checkpoint.manifest import Manifest, decode_manifest
from polyaccel.checkpoint.storage import Folder, Kind, Location, Readable, checksum, explained, open_folder
from polyaccel.checkpoint.tensor_file import Span, read_header
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard

_OTHER = "load another checkpoint; `polyaccel checkpoint verify` says which are whole"


def open_checkpoint(path: Location, *, verify: bool = True) -> Saved:
    """The checkpoint in this folder, after every byte of it was read and compared with its checksum.

    `verify=False` leaves out the bytes of arrays, and checks the manifest, the list of files, their sizes and their headers. Raises
    CheckpointError naming the file and what is wrong with it, or that there is no checkpoint.
    """
    folder = open_folder(path)
    try:
        manifest = _manifest(folder)
        saved = Saved(folder, manifest)
        saved.check_files()
        if verify:
            saved.verify()
    except OSError as error:
        raise CheckpointError(f"{folder.url} cannot be read: {error}", _OTHER) from error
    return saved


class Saved:
    """An opened checkpoint. It may be read in any order and more than once, also while a newer one takes its name."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        self._headers: dict[str, dict[str, Span]] = {}

    @property
    def path(self) -> str:
        """Where it is: a path or a URL, as it was given."""
        return self._folder.url

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of arrays, in the order in which they were saved."""
        return tuple(self.manifest.groups)

    @property
    def num_processes(self) -> int:
        """How many processes wrote it."""
        return self.manifest.num_processes

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the run said about itself: versions, engine, step, mesh, configuration without secrets."""
        return self.manifest.facts

    @property
    def shared(self) -> dict[str, Any]:
        """Plain values that were the same on all processes."""
        return self.manifest.shared

    def own(self, process_index: int) -> dict[str, Any]:
        """Plain values of one of the processes that wrote it. Raises CheckpointError for a process that was not there."""
        if not 0 <= process_index < self.num_processes:
            raise CheckpointError(
                f"{self.path} has no values of process {process_index}: {self.num_processes} processes wrote it",
                "take those of another process, or start that state anew",
            )
        return self.manifest.own[process_index]

    def arrays(self, group: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype name and global shape of every array of a group. Raises CheckpointError for a group that is not there."""
        return {name: (array.dtype, array.shape) for name, array in self._group(group).items()}

    def shards(self, group: str, names: Collection[str] | None = None) -> Iterator[Shard]:
        """The pieces of a group's arrays (of these names only), read when they are asked for, each in memory of its own.

        What numpy has no dtype for comes as its bits (bfloat16 in uint16). Raises CheckpointError, before the first piece, for a group
        or a name that is not there.
        """
        arrays = self._group(group)
        unknown = sorted(set(names or ()) - set(arrays))
        if unknown:
            raise CheckpointError(
                f"{self.path}: group {group!r} has no array {unknown[0]!r}", f"it has {len(arrays)} others"
            )
        return self._read_shards(
            group, list(arrays) if names is None else [name for name in arrays if name in set(names)]
        )

    def _read_shards(self, group: str, wanted: list[str]) -> Iterator[Shard]:
        files: dict[str, Readable] = {}
        try:
            for name in wanted:
                array = self.manifest.groups[group][name]
                for piece in array.pieces:
                    if piece.file not in files:
                        files[piece.file] = self._open(piece.file)
                    span = self._headers[piece.file][piece.key]
                    data = empty(array.dtype, piece.shape)
                    bits = data.reshape(-1).view("u1")
                    if span.end > span.start:
                        with explained(f"{self.path}: {piece.file} cannot be read"):
                            files[piece.file].read_into(span.start, bits.data)
                    if array.dtype == "bool" and bits.max(initial=0) > 1:
                        raise self._broken(piece.file, f"has a truth value other than 0 and 1 in {name!r:.200}")
                    yield Shard(name, array.shape, piece.offset, array.dtype, data)
        finally:
            for file in files.values():
                file.close()

    def check_files(self) -> None:
        """Compare the folder with the manifest: none missing, none too many, each of its size and with its arrays."""
        expected = {*self.manifest.files, names.MANIFEST}
        there = self._folder.files()
        data_files = self.manifest.data_files
        for name in sorted(expected - there.keys()):
            raise self._broken(name, "is missing")
        for name in sorted(there.keys() - expected):
            raise self._broken(name, f"is a {_KINDS[there[name]]} that does not belong to this checkpoint")
        for name, facts in self.manifest.files.items():
            if there[name] != "file":
                raise self._broken(name, f"is a {_KINDS[there[name]]}, not a file")
            file = self._open(name)
            try:
                if file.size != facts.bytes:
                    raise self._broken(name, f"has {file.size} bytes, and was written with {facts.bytes}")
                if name in data_files:
                    self._headers[name] = read_header(file)
            except Malformed as error:
                raise self._broken(name, f"has a damaged header: {error}") from None
            finally:
                file.close()
        self._check_headers()

    def verify(self, files: Collection[str] | None = None) -> None:
        """Read every byte (of these files only) and compare the checksums. Raises CheckpointError for the first file that differs."""
        for name, facts in self.manifest.files.items():
            if files is not None and name not in files:
                continue
            file = self._open(name)
            try:
                if file.size != facts.bytes:
                    raise self._broken(name, f"has {file.size} bytes, and was written with {facts.bytes}")
                if checksum(file) != facts.xxh3_128:
                    raise self._broken(name, "is not what was written: its checksum differs")
            finally:
                file.close()

    def _check_headers(self) -> None:
        unclaimed = {(file, key) for file, spans in self._headers.items() for key in spans}
        for group, arrays in self.manifest.groups.items():
            for name, array in arrays.items():
                for piece in array.pieces:
                    span = self._headers[piece.file].get(piece.key)
                    if span is None or (span.dtype, span.shape) != (STORED[array.dtype].name, piece.shape):
                        raise self._broken(piece.file, f"does not have {group} {name!r:.200} as the manifest says")
                    unclaimed.discard((piece.file, piece.key))
        for file, key in sorted(unclaimed):
            raise self._broken(file, f"has an array {key!r:.200} that belongs to nothing")

    def _group(self, group: str) -> Mapping[str, Any]:
        if group not in self.manifest.groups:
            raise CheckpointError(
                f"{self.path} has no group {group!r}", f"it has {', '.join(self.manifest.groups) or 'none'}"
            )
        return self.manifest.groups[group]

    def _open(self, name: str) -> Readable:
        try:
            return self._folder.open(name)
        except OSError as error:
            raise self._broken(name, f"cannot be opened: {error.strerror or error}") from error

    def _broken(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} {what}", _OTHER)


_KINDS: dict[Kind, str] = {"file": "file", "folder": "folder", "link": "link", "other": "device, socket or pipe"}


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a folder. Raises OSError where there is none, Malformed where it is damaged."""
    file = folder.open(names.MANIFEST)
    try:
        if file.size > MAX_BYTES:
            raise Malformed(f"it has {file.size} bytes")
        return decode_manifest(file.read(0, file.size))
    finally:
        file.close()


def _manifest(folder: Folder) -> Manifest:
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        if not folder.exists():
            raise CheckpointError(f"there is no {folder.url}", _where_else(folder)) from None
        raise CheckpointError(
            f"{folder.url} is no complete checkpoint: it has no {names.MANIFEST}",
            "was its writing interrupted, or has another tool written it? then see `polyaccel checkpoint --help`",
        ) from None
    except Malformed as error:
        raise CheckpointError(f"{folder.url}: {names.MANIFEST} is damaged: {error}", _OTHER) from None


def _where_else(folder: Folder) -> str:
    if isinstance(folder, LocalFolder):
        for name in folder.parent().entries():
            found = names.read_leftover(name)
            if found and found == (folder.name, "replaced"):
                return f"a replacement of it was interrupted; the old one is still there, as {str(folder.sibling(name).path)!r}"
    return "check the path"
