"""A handle's arrays as shards and back: each process gives the pieces that it holds first, and takes the pieces that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel_jax.handles import JaxModel, JaxOptimizer


def read(handle: JaxModel | JaxOptimizer) -> Iterator[Shard]:
    """Every global element exactly once over all processes; waits for the device."""
    for name, array in _arrays(handle).items():
        if _is_key(array):
            array = jax.random.key_data(array)
        for piece in array.addressable_shards:
            if piece.replica_id == 0:
                offset = tuple(index.start or 0 for index in piece.index)
                yield Shard(name, tuple(array.shape), offset, array.dtype.name, np.asarray(piece.data))


def write(handle: JaxModel | JaxOptimizer, shards: Iterable[Shard]) -> None:
    """Replace a handle's arrays by the shards of any mesh. Raises CheckpointError for missing, unknown or misshapen values."""
    current = _arrays(handle)
    values: dict[str, np.ndarray[Any, Any]] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        if shard.name not in current:
            raise CheckpointError(
                f"the saved state has {shard.name!r}, which is not here",
                "load it into the model or optimizer that it was saved from",
            )
        like = jax.random.key_data(current[shard.name]) if _is_key(current[shard.name]) else current[shard.name]
        if tuple(shard.global_shape) != like.shape:
            raise CheckpointError(
                f"{shard.name!r} was saved with shape {tuple(shard.global_shape)} and has shape {like.shape} here",
                "load it into the model or optimizer that it was saved from",
            )
        whole = values.setdefault(shard.name, np.empty(like.shape, like.dtype))
        data = np.asarray(shard.data)
        if shard.dtype == "bfloat16" and data.dtype == np.uint16:  # as torch hands it out: numpy alone has no such type
            data = data.view(jnp.bfloat16)
        whole[tuple(slice(start, start + size) for start, size in zip(shard.offset, data.shape, strict=True))] = data
        filled[shard.name] = filled.get(shard.name, 0) + data.size
    missing = [name for name in current if name not in values or filled[name] < values[name].size]
    if missing:
        raise CheckpointError(f"the saved state lacks {', '.join(missing)}", "give every shard of the state")
    restored = {
        name: jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(current[name]))
        if _is_key(current[name])
        else value
        for name, value in values.items()
    }
    if isinstance(handle, JaxModel):
        handle.assign(restored)
    else:
        handle.state = jax.tree.unflatten(handle.treedef, [restored[name] for name in current])


def _is_key(array: jax.Array) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))


def _arrays(handle: JaxModel | JaxOptimizer) -> dict[str, jax.Array]:
    if isinstance(handle, JaxModel):
        return {**handle.params, **handle.buffer_arrays}
    state = handle.state
    if hasattr(handle.source, "state_names"):
        return dict(zip(handle.source.state_names(state), jax.tree.leaves(state), strict=True))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
