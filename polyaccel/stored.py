"""What other libraries' files hold, as trees: nested dicts, lists and tuples of plain values and of arrays that are read one at a time.

An adapter reads and writes such files with its framework; where in a tree a model's weights or an optimizer's state stand is known
above the seam (`polyaccel.checkpoint`).
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array that is not in memory: `read()` gives it as a host (numpy) array of `shape`, at every call anew.

    `dtype` is numpy's or ml_dtypes' name. What numpy alone has no type for may come as its bits ("bfloat16" in uint16, "float8_*"
    in uint8) or as an ml_dtypes array; whoever takes it accepts both. `kind` is whose array it is in user code: "torch", "numpy", "jax".
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Any]
    kind: str = "torch"


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A box of a weight: the array `key` of a file (safetensors, or torch's own), from `offset` on in the whole weight."""

    file: Path
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of a checkpoint, not read yet: its whole shape, and the pieces that fill it."""

    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


class TreeFiles(Protocol):
    """Files of one library, found by entry point ("polyaccel.tree_files"); making one imports no framework."""

    name: str

    def read(self, path: Path) -> Any:
        """The tree in the file or folder `path`. Runs nothing that is stored there.

        Raises CheckpointError for what cannot be read as data, and BackendUnavailableError where the library is not installed.
        """
        ...

    def write(self, path: Path, tree: Any) -> None:
        """Write the tree to `path`, which does not exist, as the library itself would. No array is in memory longer than it takes.

        Raises CheckpointError for a value that the library cannot hold.
        """
        ...


class Spool:
    """Arrays on disk, mapped, for libraries that want all of a tree at once. A context: the space is free again at its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Any = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, array: Any) -> Any:
        """The same array, backed by a file: as it is where a file backs it already, else copied to a nameless one in the folder."""
        import numpy as np

        if array.nbytes == 0 or _is_mapped(array):
            return array
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed by __exit__
        start = -(-self._file.seek(0, 2) // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        np.ascontiguousarray(array).tofile(self._file)
        self._file.flush()
        return np.memmap(self._file, array.dtype, "c", start, array.shape)


def _is_mapped(value: Any) -> bool:
    while value is not None:
        if isinstance(value, mmap.mmap):
            return True
        value = value.obj if isinstance(value, memoryview) else getattr(value, "base", None)
    return False
