"""What one process gives to a checkpoint: named groups of array pieces, and plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from polyaccel.checkpoint.names import check_group
from polyaccel.protocols import Shard


@dataclass(slots=True)
class Contents:
    """One process's share of a checkpoint. Nothing is copied here: whoever hands it to a background writer gives it for good.

    Args:
        groups: pieces of arrays by group (`model`, `optimizer_1`, ...). Over all processes, every element of an array once. A group
            may be empty. Names are free within a group; one dtype and one global shape per name.
        shared: plain values that are the same everywhere; those of the main process are kept.
        own: plain values of this process alone (its random state, ...).

    Plain values are None, bool, int, float, str, bytes, and lists, tuples, sets, dicts and Counters of them; see `values.pack`.
    Raises CheckpointError for a group whose name cannot be that of a file.
    """

    groups: dict[str, list[Shard]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            check_group(group)
