"""safetensors files mapped into memory: an array costs nothing until somebody reads it."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from polyaccel.checkpoint.documents import Malformed
from polyaccel.checkpoint.dtypes import STORED
from polyaccel.checkpoint.tensor_file import Span, read_header
from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredArray

_NAMES = {stored.name: name for name, stored in reversed(STORED.items()) if stored.name != "U8"} | {"U8": "uint8"}


class _MappedFile:
    """A file as `read_header` takes it; writes to the map stay in this process."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = path.stat().st_size
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else None
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        if self.map is None or offset + length > self.size:
            raise CheckpointError(f"{self._path} ends at byte {self.size}", "take another copy of it")
        return self.map[offset : offset + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self.read(offset, target.nbytes)

    def close(self) -> None:
        """The arrays own the map."""


def read_tensors(path: Path) -> dict[str, StoredArray]:
    """Every array of a safetensors file by its key. Raises CheckpointError for a file that is none."""
    try:
        file = _MappedFile(path)
        spans = read_header(file)
    except Malformed as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}", "take another copy of it") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "check the path and its permissions") from error
    return {
        key: StoredArray(_NAMES[span.dtype], span.shape, lambda span=span: _array(file, span))  # type: ignore[misc]
        for key, span in spans.items()
    }


def _array(file: _MappedFile, span: Span) -> Any:
    import numpy as np

    dtype = np.dtype(STORED[_NAMES[span.dtype]].numpy)
    if span.start == span.end:
        return np.empty(span.shape, dtype)
    array = np.frombuffer(file.map, dtype, (span.end - span.start) // dtype.itemsize, span.start)  # type: ignore[arg-type]
    return (array if array.flags.aligned else array.copy()).reshape(span.shape)
