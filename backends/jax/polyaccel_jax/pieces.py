"""Arrays of which this process holds a part: made of what the host has, and this process's part of them taken out again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from polyaccel.errors import UnsupportedError

# -- in ----------------------------------------------------------------------------------------------------------------


def from_host(value: Any, sharding: Sharding) -> jax.Array:
    """An array of a value that all processes have alike: each device gets its piece alone. Random keys stay keys."""
    if _is_key(value):
        data = from_host(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.array(value)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def laid_anew(value: Any, sharding: Sharding) -> jax.Array:
    """A copy that lies so, of what all processes have alike or of an array that lies otherwise on the same devices.

    Waits for the transfer: no more than this value is in host memory for it.
    """
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        copied: jax.Array = jax.jit(jnp.copy, out_shardings=sharding)(value)
        return copied
    if _is_key(value):
        return from_host(value, sharding)
    host = np.asarray(value)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    held = sharding.addressable_devices_indices_map(host.shape)
    # Memory of their own: an update is given these arrays to reuse it, and a piece must not keep all of the host's array.
    parts = [jax.device_put(np.array(host[index]), device, may_alias=False) for device, index in held.items()]
    made = jax.make_array_from_single_device_arrays(host.shape, sharding, parts)
    return made.block_until_ready()


def from_rows(rows: Any, sharding: Sharding, axis: int, feed: int, num_feeds: int) -> jax.Array:
    """A batch that is cut along `axis` over `num_feeds` groups of processes, of the rows of group `feed`, which this process has."""
    host = np.array(rows)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    size = host.shape[axis]
    whole = tuple(length * num_feeds if dim == axis else length for dim, length in enumerate(host.shape))
    start = feed * size

    def piece(index: Any) -> Any:
        first, last, _ = index[axis].indices(whole[axis])
        return host[(*index[:axis], slice(first - start, last - start), *index[axis + 1 :])]

    return jax.make_array_from_callback(whole, sharding, piece)


# -- out ---------------------------------------------------------------------------------------------------------------


def local(array: jax.Array, devices: Sequence[jax.Device]) -> jax.Array:
    """The box of an array that this process holds, as an array of its own devices.

    Where it is cut along one dim it stays on all of them, and nothing is waited for.
    """
    held = _by_place(array)
    first = next(iter(held.values()))
    if len(held) == 1:
        return first[0].data
    _, shape = _box(array)
    cut = [dim for dim, size in enumerate(shape) if size != first[0].data.shape[dim]]
    counts = {len(copies) for copies in held.values()}
    if len(cut) > 1 or len(counts) > 1:
        return jax.device_put(local_to_host(array), devices[0])
    axis = cut[0]
    rows = [copies for _, copies in sorted(held.items())]
    mesh = Mesh(np.array([[copy.device for copy in copies] for copies in rows]), ("local", "copy"))
    sharding = NamedSharding(mesh, PartitionSpec(*([None] * axis), "local"))
    parts = [copy.data for copies in rows for copy in copies]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def local_to_host(array: jax.Array) -> np.ndarray[Any, Any]:
    """The box of an array that this process holds, as numpy; waits for the device."""
    starts, shape = _box(array)
    host = np.empty(shape, array.dtype)
    for place, copies in _by_place(array).items():
        piece = np.asarray(copies[0].data)
        where = zip(place, starts, piece.shape, strict=True)
        host[tuple(slice(start - low, start - low + size) for start, low, size in where)] = piece
    return host


def _by_place(array: jax.Array) -> dict[tuple[int, ...], list[Any]]:
    """The pieces on this process's devices by where they start; equal ones together."""
    found: dict[tuple[int, ...], list[Any]] = {}
    for shard in array.addressable_shards:
        found.setdefault(tuple(index.start or 0 for index in shard.index), []).append(shard)
    return found


def _box(array: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the pieces of this process start as a whole, and the shape that they fill."""
    places = {place: copies[0].data.shape for place, copies in _by_place(array).items()}
    starts = tuple(map(min, zip(*places, strict=True)))
    ends = [tuple(start + size for start, size in zip(place, shape, strict=True)) for place, shape in places.items()]
    shape = tuple(end - start for end, start in zip(map(max, zip(*ends, strict=True)), starts, strict=True))
    if math.prod(shape) != sum(map(math.prod, places.values())):
        raise ValueError(f"the pieces of an array of shape {array.shape} on this process do not fill a box")
    return starts, shape


def in_pieces(what: str) -> UnsupportedError:
    """What is said where user code reads a value that no process has whole."""
    return UnsupportedError(
        f"{what} lies in pieces on several processes, and none of them has all of it to read",
        "on every process: accelerator.get_state_dict(model) and save_model gather parameters, save_state saves everything in its pieces",
    )


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))
