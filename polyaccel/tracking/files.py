"""The files of a run folder, written so that a reader never meets half a line or half a file, whatever happens to the process or disk."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyaccel.tracking.values import to_json

MAX_LINES_HELD = 100_000  # while the disk takes none; later lines are counted as lost


def encode(value: Any) -> bytes:
    """One line of strict JSON."""
    return json.dumps(to_json(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "backslashreplace"
    )


def replace(path: Path, value: Mapping[str, Any]) -> None:
    """Write a whole JSON file: a reader sees the old one or the new one."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(to_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)
        raise


class Lines:
    """A file of JSON lines, appended to. What the disk refuses is held and offered again with the next write, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lost = 0
        self._held: deque[bytes] = deque()
        self._descriptor: int | None = None

    @property
    def num_held(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._held)

    def add(self, line: bytes) -> None:
        """Take one line; `write` brings it to the file."""
        if len(self._held) >= MAX_LINES_HELD:
            self.num_lost += 1
            return
        self._held.append(line)

    def write(self) -> None:
        """Hand every held line to the operating system: from here on it outlives the process. Raises OSError, and loses nothing."""
        if not self._held:
            return
        if self._descriptor is None:
            self._open()
        while self._held:
            count = min(len(self._held), 1000)
            block = b"".join(self._held[index] + b"\n" for index in range(count))
            self._append(block)
            for _ in range(count):
                self._held.popleft()

    def sync(self) -> None:
        """Ask the disk itself to keep what was written."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # A killed process may have left half a line: a resumed run must not continue it.
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        if end and os.pread(self._descriptor, 1, end - 1) != b"\n":
            self._append(b"\n")

    def _append(self, block: bytes) -> None:
        assert self._descriptor is not None
        before = os.lseek(self._descriptor, 0, os.SEEK_END)
        view = memoryview(block)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, before)  # all of the block or nothing: it is offered again as a whole
            raise
