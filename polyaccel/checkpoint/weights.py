"""A model's present values by name, as the script's framework has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from polyaccel.checkpoint.array_values import take_arrays
from polyaccel.errors import CheckpointError, PrepareError
from polyaccel.protocols import Bridge, Engine, Shard
from polyaccel.shards import HoldsPieces


def state_dict_of(engine: Engine, bridge: Bridge | None, handle: Any, own: Any) -> Any:
    """`own.state_dict()` of a user's model that has one, else numpy arrays by name. Every process must call it.

    Where the processes hold pieces, one array at a time is on its way between them.
    """
    if hasattr(own, "state_dict"):
        holder = engine if bridge is None else bridge
        return holder.whole_state_dict(own) if isinstance(holder, HoldsPieces) else own.state_dict()
    pieces: dict[str, list[Any]] = {}
    for shard in engine.read_state(handle):
        pieces.setdefault(shard.name, []).append((shard.global_shape, shard.offset, shard.data))
    if engine.topology.num_processes == 1:
        return {name: _assembled(parts) for name, parts in pieces.items()}
    gather = engine.collectives.all_gather_object
    names = dict.fromkeys(name for held in gather(list(pieces)) for name in held)
    return {name: _assembled([one for part in gather(pieces.pop(name, [])) for one in part]) for name in names}


def plain_state_dict(model: Any, offloaded: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The `state_dict` of a torch module that is not prepared; `offloaded` reads one whose values are partly elsewhere.

    Raises PrepareError for a model without `state_dict`: only prepare knows how to read it.
    """
    if not callable(getattr(model, "state_dict", None)) or not callable(getattr(model, "parameters", None)):
        raise PrepareError(
            f"model, a {type(model).__name__}, is not a prepared model", "pass what accelerator.prepare returned for it"
        )
    if any(getattr(parameter, "is_meta", False) for parameter in model.parameters()):
        return offloaded(model)
    # With the module's own tensors, tied ones are one object.
    values: dict[str, Any] = model.state_dict(keep_vars=True)
    return values


def shards_of(state: dict[str, Any]) -> Iterator[Shard]:
    """Every array of a state dict under its name, tied ones once. Raises CheckpointError for what is no array."""
    seen: set[int] = set()
    for name, value in state.items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        held: list[Shard] = []
        take_arrays(value, name, held)
        if len(held) != 1 or held[0].name != name:
            raise CheckpointError(f"{name} is a {type(value).__name__}, no array", "keep it in a buffer")
        yield held[0]


def _assembled(pieces: list[Any]) -> Any:
    import numpy as np

    whole = np.empty(tuple(pieces[0][0]), pieces[0][2].dtype)
    for _, offset, data in pieces:
        whole[tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))] = data
    return whole
