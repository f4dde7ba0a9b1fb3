"""Checkpoint folders on a URL, through fsspec. Storages that cannot rename a folder in one step: the manifest, written last, commits."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from polyaccel.checkpoint import names
from polyaccel.checkpoint.manifest import FileFacts
from polyaccel.checkpoint.storage import Folder, Kind
from polyaccel.errors import CheckpointError

_CHUNK = 8 << 20  # one request each on most storages


def open_remote(url: str) -> RemoteFolder:
    """The folder at that URL. Raises CheckpointError where fsspec, or its package for this storage, is not installed."""
    try:
        import fsspec
    except ImportError:
        raise CheckpointError(
            f"{url!r} is a URL, and fsspec is not installed", "pip install 'polyaccel[remote]', or give a path"
        ) from None
    try:
        storage, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"{url!r} cannot be opened: {error}", "give a path, or install that storage's package"
        ) from error
    return RemoteFolder(storage, path.rstrip("/"), url.rstrip("/"))


class RemoteFolder:
    """A prefix of names on a storage of fsspec."""

    can_rename = False

    def __init__(self, storage: Any, path: str, url: str) -> None:
        self.name = path.rpartition("/")[2]
        self.url = url
        self._storage = storage
        self._path = path

    def sibling(self, name: str) -> RemoteFolder:
        parent, url = self._path.rpartition("/")[0], self.url.rpartition("/")[0]
        return RemoteFolder(self._storage, f"{parent}/{name}", f"{url}/{name}")

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._storage, f"{self._path}/{name}", f"{self.url}/{name}")

    def parent(self) -> RemoteFolder:
        return RemoteFolder(self._storage, self._path.rpartition("/")[0], self.url.rpartition("/")[0])

    def exists(self) -> bool:
        return bool(self._storage.exists(self._path))

    def kind(self) -> Kind:
        return _kind(self._storage.info(self._path))

    def entries(self) -> dict[str, Kind]:
        self._storage.invalidate_cache()
        try:
            listed = self._storage.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {name: _kind(facts) for facts in listed if (name := _inside(facts["name"], self._path))}

    def files(self) -> dict[str, Kind]:
        self._storage.invalidate_cache()
        found = self._storage.find(self._path, withdirs=False, detail=True)
        return {_inside(path, self._path): _kind(facts) for path, facts in found.items()}

    def sizes(self) -> dict[str, int]:
        self._storage.invalidate_cache()
        try:
            listed = self._storage.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {facts["name"]: int(facts.get("size") or 0) for facts in listed}

    def make(self) -> None:
        self._storage.makedirs(self._path, exist_ok=True)

    def write(self, name: str, buffers: Iterable[memoryview]) -> FileFacts:
        import xxhash

        digest, size = xxhash.xxh3_128(), 0
        with self._storage.open(f"{self._path}/{name}", "wb") as file:
            for buffer in buffers:
                for start in range(0, buffer.nbytes, _CHUNK):
                    chunk = buffer[start : start + _CHUNK]
                    digest.update(chunk)
                    file.write(chunk)
                    size += chunk.nbytes
        return FileFacts(size, digest.hexdigest())

    def adopt(self, path: str) -> FileFacts:
        raise CheckpointError(
            f"{path!r} was put into {self.url} by somebody else", "remove it, or write checkpoints to a path"
        )

    def open(self, path: str) -> RemoteFile:
        full = f"{self._path}/{path}"
        facts = self._storage.info(full)
        if _kind(facts) != "file":
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return RemoteFile(self._storage.open(full, "rb"), int(facts["size"]), path)

    def rename_file(self, old: str, new: str) -> None:
        self._storage.mv(f"{self._path}/{old}", f"{self._path}/{new}")

    def remove_file(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.rm_file(f"{self._path}/{name}")

    def publish(self, target: Folder, aside: Folder | None) -> None:
        """Nothing is left to do: the manifest, just written, is what makes it a checkpoint."""

    def delete(self, aside: Folder) -> None:
        self.remove_file(names.MANIFEST)  # first: without it, what is left is no checkpoint
        if self.exists():
            self._storage.rm(self._path, recursive=True)


class RemoteFile:
    """A file of the storage, read in order or at a place."""

    def __init__(self, file: Any, size: int, path: str) -> None:
        self.size = size
        self._file = file
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        data: bytes = self._file.read(length)
        if len(data) != length:
            raise CheckpointError(
                f"{self._path} ends before byte {offset + length}", "it has changed since it was opened"
            )
        return data

    def read_into(self, offset: int, target: memoryview) -> None:
        for start in range(0, target.nbytes, _CHUNK):
            length = min(_CHUNK, target.nbytes - start)
            target[start : start + length] = self.read(offset + start, length)

    def close(self) -> None:
        self._file.close()


def _inside(path: str, folder: str) -> str:
    return path.rstrip("/").removeprefix(folder.rstrip("/")).lstrip("/")


def _kind(facts: dict[str, Any]) -> Kind:
    if facts.get("islink"):
        return "link"
    kinds: dict[str, Kind] = {"file": "file", "directory": "folder"}
    return kinds.get(facts["type"], "other")
