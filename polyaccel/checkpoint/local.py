"""Checkpoint folders on a file system: data is synced before the name that makes it visible, links are never followed inside."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from polyaccel.checkpoint.manifest import FileFacts
from polyaccel.checkpoint.storage import Folder, Kind, checksum
from polyaccel.errors import CheckpointError

_CHUNK = 1 << 20  # hashed and written while it is in the processor's cache
_MAX_BUFFERS = 512  # of one writev; the system's own limit is 1024
_WRITEBACK = 32 << 20  # the disk starts on this much while the rest is still being copied,
_BEHIND = 16 << 20  # this far behind, since a page that is on its way to the disk cannot be written to
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_AT_CWD = -100


class LocalFolder:
    """A folder on a file system that this process can reach by path."""

    can_rename = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = self.path.name
        self.url = str(path)
        self._descriptor: int | None = None

    def sibling(self, name: str) -> LocalFolder:
        return LocalFolder(self.path.with_name(name))

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def kind(self) -> Kind:
        return _kind(os.stat(self.path, follow_symlinks=False).st_mode)

    def entries(self) -> dict[str, Kind]:
        try:
            with os.scandir(self.path) as found:
                return {entry.name: _kind(entry.stat(follow_symlinks=False).st_mode) for entry in found}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def files(self) -> dict[str, Kind]:
        found: dict[str, Kind] = {}
        for base, folders, files, descriptor in os.fwalk(dir_fd=self._folder(), top=".", follow_symlinks=False):
            for name in [*files, *folders]:
                kind = _kind(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)
                if kind != "folder":
                    found[os.path.normpath(os.path.join(base, name))] = kind
        return found

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as found:
                return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in found}
        except FileNotFoundError:
            return {}

    def make(self) -> None:
        missing = []
        path = self.path
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)

    def write(self, name: str, buffers: Iterable[memoryview]) -> FileFacts:
        import xxhash

        digest, size, started = xxhash.xxh3_128(), 0, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
        descriptor = os.open(name, flags, 0o666, dir_fd=self._folder())
        try:
            for batch in _batches(buffers):
                for chunk in batch:
                    digest.update(chunk)
                size += _write_all(descriptor, batch)
                if size - _BEHIND - started >= _WRITEBACK:
                    _start_writeback(descriptor, started, _WRITEBACK)
                    started += _WRITEBACK
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileFacts(size, digest.hexdigest())

    def adopt(self, path: str) -> FileFacts:
        file = self.open(path)
        try:
            os.fsync(file.descriptor)
            facts = FileFacts(file.size, checksum(file))
        finally:
            file.close()
        folder = os.path.dirname(path)
        while folder:
            _sync_folder(self.path / folder)
            folder = os.path.dirname(folder)
        return facts

    def open(self, path: str) -> LocalFile:
        *folders, name = path.split("/")
        inside = self._folder()
        opened: list[int] = []
        try:
            for folder in folders:
                opened.append(inside := os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=inside))
            # Without O_NONBLOCK, a planted pipe would hold the reader forever.
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _SAFE, dir_fd=inside)
        finally:
            for one in opened:
                os.close(one)
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return LocalFile(descriptor, facts.st_size, path)

    def rename_file(self, old: str, new: str) -> None:
        folder = self._folder()
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def remove_file(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder())

    def publish(self, target: Folder, aside: Folder | None) -> None:
        assert isinstance(target, LocalFolder)
        os.fsync(self._folder())
        if aside is None or not target.entries():
            os.rename(self.path, target.path)  # over nothing or an empty folder; anything else refuses
            _sync_folder(target.path.parent)
            return
        assert isinstance(aside, LocalFolder)
        if _exchange(self.path, target.path):
            _sync_folder(target.path.parent)
            shutil.rmtree(self.path)
            return
        os.rename(target.path, aside.path)
        os.rename(self.path, target.path)
        _sync_folder(target.path.parent)
        shutil.rmtree(aside.path)

    def delete(self, aside: Folder) -> None:
        assert isinstance(aside, LocalFolder)
        os.rename(self.path, aside.path)
        shutil.rmtree(aside.path)

    def _folder(self) -> int:
        # Held open: whoever moves or replaces the folder meanwhile does not change what is read or written here.
        if self._descriptor is None:
            self._descriptor = os.open(self.path, _FOLDER)
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


class LocalFile:
    """An open regular file."""

    def __init__(self, descriptor: int, size: int, path: str) -> None:
        self.descriptor = descriptor
        self.size = size
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        while target.nbytes:
            count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {offset}, before its arrays do", "it was cut off after it was opened"
                )
            offset, target = offset + count, target[count:]

    def close(self) -> None:
        os.close(self.descriptor)


def _kind(mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"


def _batches(buffers: Iterable[memoryview]) -> Iterable[list[memoryview]]:
    """The buffers in lists of about `_CHUNK` bytes: large ones cut, small ones together, none copied."""
    batch: list[memoryview] = []
    size = 0
    for buffer in buffers:
        start = 0
        while start < buffer.nbytes:
            chunk = buffer[start : start + _CHUNK - size]
            batch.append(chunk)
            start, size = start + chunk.nbytes, size + chunk.nbytes
            if size >= _CHUNK or len(batch) >= _MAX_BUFFERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_all(descriptor: int, batch: list[memoryview]) -> int:
    size = sum(chunk.nbytes for chunk in batch)
    written = os.writev(descriptor, batch)
    total = written
    while total < size:  # a signal, or a disk that is nearly full
        rest, skip = [], total
        for chunk in batch:
            if skip < chunk.nbytes:
                rest.append(chunk[skip:])
            skip = max(0, skip - chunk.nbytes)
        total += os.writev(descriptor, rest)
    return size


def _start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing this range; Linux does so when it is told that the pages are not needed soon."""
    with suppress(OSError):  # a wish, and not every file system has an ear for it
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, _FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where the kernel, the C library or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))
