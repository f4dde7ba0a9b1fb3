"""Small texts that the processes of a job share beside their collectives, for what one process does alone or in the background."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """One connection to the texts of a job, for one thread. Both methods raise RuntimeError when the job can no longer be reached."""

    def set(self, key: str, value: str) -> None:
        """Write a text for all processes, in place of an earlier one."""
        ...

    def get(self, key: str) -> str | None:
        """The text of this key, or None as long as no process has written one. Does not wait."""
        ...


class MemoryStore:
    """The store of a job of one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        """Write a text."""
        self._texts[key] = value

    def get(self, key: str) -> str | None:
        """The text of this key, or None."""
        return self._texts.get(key)
