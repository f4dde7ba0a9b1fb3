"""A handle's arrays as shards and back: each process gives the pieces that it holds first, and takes the pieces that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec, Shard
from polyaccel_jax.dialect.host_arrays import assemble, assembled, check_arrays, copied, spec_of, with_keys, words
from polyaccel_jax.handles import JaxModel, JaxOptimizer
from polyaccel_jax.precision import all_finite


def read(handle: JaxModel | JaxOptimizer) -> Iterator[Shard]:
    """Every global element exactly once over all processes; waits for the device."""
    if isinstance(handle, JaxModel):
        handle.source.settle(for_writing=False)
        return _shards(_saved_of_model(handle))
    return _shards(handle.source.saved(handle.state))


def check(handle: JaxModel | JaxOptimizer, specs: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError for missing, unknown or misshapen values."""
    if isinstance(handle, JaxModel):
        wanted = {name: spec_of(array) for name, array in _saved_of_model(handle).items()}
        check_arrays(type(handle.source.module).__name__, wanted, specs)
    else:
        handle.source.check(specs, handle.state)


def write(handle: JaxModel | JaxOptimizer, shards: Iterable[Shard]) -> None:
    """Replace a handle's arrays by the shards of any mesh. Raises CheckpointError for missing, unknown or misshapen values."""
    if isinstance(handle, JaxModel):
        _write_model(handle, shards)
        return
    arrays = assemble(shards)
    check(handle, {name: spec_of(array) for name, array in arrays.items()})
    handle.state = handle.source.restored(arrays, handle.state)


def _write_model(model: JaxModel, shards: Iterable[Shard]) -> None:
    """One array at a time is whole in host memory; the model changes when all of them are there."""
    model.source.settle(for_writing=True)
    current = _saved_of_model(model)
    specs: dict[str, ArraySpec] = {}
    placed: dict[str, jax.Array] = {}
    for name, array in assembled(shards):
        specs[name] = spec_of(array)
        if name in current and spec_of(current[name]) == specs[name]:  # of the others `check` speaks
            placed[name] = model.placed(name, with_keys(array, current[name]))
    check(model, specs)
    model.take(placed)


def read_gradients(model: JaxModel) -> Iterator[Shard]:
    """Accumulated gradients of the global batch: one entry along an added dim 0."""
    model.source.settle(for_writing=False)
    for shard in _shards(model.gradients):
        shape, offset = (1, *shard.global_shape), (0, *shard.offset)
        yield Shard(shard.name, shape, offset, shard.dtype, shard.data[None])


def write_gradients(model: JaxModel, shards: Iterable[Shard]) -> None:
    """Replace the gradients. Raises CheckpointError for those of no parameter."""
    arrays = assemble(shards)
    for name, array in arrays.items():
        held = model.params.get(name)
        if held is None or held.shape != array.shape:
            raise CheckpointError(
                f"the checkpoint has a gradient of {name!r}, of shape {array.shape}, and the model no such parameter",
                "build the model with the settings that it was saved with",
            )
    source: Any = model.source
    source.settle(for_writing=True)
    if hasattr(source, "forget_grads"):
        source.forget_grads()
    model.zero_grad(None)
    if not arrays:
        return
    engine = model.engine
    with engine.dtypes(model.wants_64bit):
        dtypes = [np.promote_types(model.params[name].dtype, np.float32) for name in arrays]
        cast = [array.astype(dtype) for array, dtype in zip(arrays.values(), dtypes, strict=True)]
        model.gradients = dict(zip(arrays, engine.mesh.keep(cast, map(model.full, arrays)), strict=True))
        if engine.scaler is not None:
            model.overflow = jax.jit(all_finite)(model.gradients)


def _shards(arrays: Mapping[str, jax.Array]) -> Iterator[Shard]:
    plain = {name: words(array) for name, array in arrays.items()}
    for array in plain.values():  # all transfers run while the first is waited for
        array.copy_to_host_async()
    for name, array in plain.items():
        for piece in array.addressable_shards:
            if piece.replica_id == 0:
                offset = tuple(index.start or 0 for index in piece.index)
                yield Shard(name, tuple(array.shape), offset, array.dtype.name, copied(piece.data))


def _saved_of_model(model: JaxModel) -> dict[str, jax.Array]:
    left_out = model.source.transient
    arrays = {**model.params, **model.buffer_arrays}
    return {name: array for name, array in arrays.items() if name not in left_out}
