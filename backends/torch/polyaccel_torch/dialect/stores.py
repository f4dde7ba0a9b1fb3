"""The store through which the processes of a torch.distributed group have found each other, for small texts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class GroupStore:
    """See `polyaccel.store.Store`. A clone: a store of torch is for one thread, and the original is used by the main one."""

    def __init__(self) -> None:
        store: Any = (
            dist.distributed_c10d._get_default_store()
        )  # also where the script made the group itself; the stubs lack `clone`
        self._store = store.clone()

    def set(self, key: str, value: str) -> None:
        """Write a text for all processes."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """The text of this key, or None; does not wait."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else None
