"""What a checkpoint needs of a place to store files: a local folder, or a URL that fsspec understands."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Literal, Protocol

from polyaccel.checkpoint.manifest import FileFacts
from polyaccel.errors import CheckpointError

Kind = Literal["file", "folder", "link", "other"]
Location = str | PathLike[str]
_CHUNK = 1 << 20  # read and hashed while it is in the processor's cache
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Readable(Protocol):
    """An open file of known size. Reading past its end raises CheckpointError."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`, a writable view of bytes, from this place on."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Folder(Protocol):
    """A folder that may not exist yet. What the storage refuses is raised as OSError; the caller says what it was doing."""

    name: str
    url: str  # for people: the path, or the address
    can_rename: bool  # a folder becomes visible in one step; otherwise the manifest, written last, is the commit marker

    def sibling(self, name: str) -> Folder:
        """The folder of that name beside this one."""
        ...

    def child(self, name: str) -> Folder:
        """The folder of that name inside this one."""
        ...

    def parent(self) -> Folder:
        """The folder that this one is in."""
        ...

    def exists(self) -> bool:
        """Whether anything is there under this name."""
        ...

    def kind(self) -> Kind:
        """What is there. Raises OSError where nothing is."""
        ...

    def entries(self) -> dict[str, Kind]:
        """What is directly inside, by name; nothing where the folder does not exist."""
        ...

    def files(self) -> dict[str, Kind]:
        """All that is no folder, by path relative to here, below folders too. Links are named, never followed."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly inside, to see whether somebody still writes."""
        ...

    def make(self) -> None:
        """Create it, and what it is in, so that it outlives a power loss."""
        ...

    def write(self, name: str, buffers: Iterable[memoryview]) -> FileFacts:
        """A new file, on the disk when this returns; hashed on the way, in one pass, without another copy."""
        ...

    def adopt(self, path: str) -> FileFacts:
        """Bring a file that somebody else has written to the disk, and hash it."""
        ...

    def open(self, path: str) -> Readable:
        """A regular file inside this folder; a link is refused on the way. Raises OSError."""
        ...

    def rename_file(self, old: str, new: str) -> None:
        """Give a file another name; a storage that cannot do that copies it."""
        ...

    def remove_file(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        ...

    def publish(self, target: Folder, aside: Folder | None) -> None:
        """Give this folder its final name, in one step, and bring that to the disk; without `can_rename` it has had it all along.

        `aside`: what is there now is replaced, by way of this name where two folders cannot be exchanged in one step. None: raises
        OSError if something is there (an empty folder is nothing).
        """
        ...

    def delete(self, aside: Folder) -> None:
        """Remove it and all inside; it is no checkpoint any more from the first moment on (`aside`: a name to move it to first)."""
        ...


def is_url(location: Location) -> bool:
    """Whether it names a remote storage (`s3://...`, `memory://...`)."""
    text = fspath(location)
    return "://" in text and not text.startswith("file://")


def open_folder(location: Location) -> Folder:
    """The folder at a path or URL. `file://` is a path; other schemes are those of fsspec, imported here.

    Raises CheckpointError for a scheme that nothing installed understands.
    """
    text = fspath(location)
    if not isinstance(text, str) or "\0" in text or not text:
        raise CheckpointError(f"{text!r} cannot be a folder of checkpoints", "give a path or a URL")
    if is_url(text):
        from polyaccel.checkpoint.remote import open_remote

        return open_remote(text)
    from polyaccel.checkpoint.local import LocalFolder

    return LocalFolder(text.removeprefix("file://"))


def checksum(file: Readable) -> str:
    """The xxh3_128 of all bytes of a file, in hex."""
    import xxhash

    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    for offset in range(0, file.size, _CHUNK):
        chunk = buffer[: min(_CHUNK, file.size - offset)]
        file.read_into(offset, chunk)
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """An OSError inside becomes a CheckpointError that says what was being done, what the storage said, and what helps."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        place = f" ({error.filename})" if error.filename else ""
        if error.errno in _FULL:
            raise CheckpointError(
                f"{what}: {reason}{place}",
                "free some space, lower total_limit, or write elsewhere; earlier checkpoints are untouched",
            ) from error
        raise CheckpointError(
            f"{what}: {reason}{place}", "see that the folder is there and may be written to"
        ) from error
