"""A model's present values by name, as the script's framework has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyaccel.protocols import Engine


def state_dict_of(engine: Engine, handle: Any, own: Any, gather: Callable[[Any], list[Any]]) -> Any:
    """`own.state_dict()` of a user's model that has one, else numpy arrays by name. Every process must call it."""
    if hasattr(own, "state_dict"):
        return own.state_dict()
    shards = engine.read_state(handle)
    pieces: list[Any] = [(shard.name, shard.global_shape, shard.offset, shard.data) for shard in shards]
    if engine.topology.num_processes > 1:
        pieces = [tuple(piece) for part in gather(pieces) for piece in part]
    return _assembled(pieces)


def _assembled(pieces: list[Any]) -> dict[str, Any]:
    import numpy as np

    whole: dict[str, Any] = {}
    for name, shape, offset, data in pieces:
        array = whole.setdefault(name, np.empty(tuple(shape), data.dtype))
        array[tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))] = data
    return whole
