"""jax arrays as host arrays and back: pieces put together, random keys as the words that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec, Shard

_SETTINGS = "build it with the settings that it was saved with"


def is_key(array: Any) -> bool:
    """Whether an array holds typed random keys."""
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))


def words(array: jax.Array) -> jax.Array:
    """Random keys as the unsigned integers that they are made of; anything else as it is."""
    return jax.random.key_data(array) if is_key(array) else array


def with_keys(array: Any, like: jax.Array) -> Any:
    """A host array as what `like` is: words become random keys where that holds keys."""
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like)) if is_key(like) else array


def spec_of(array: Any) -> ArraySpec:
    """Shape and dtype of an array; of the words of random keys."""
    if isinstance(array, jax.Array):
        array = words(array)
    return ArraySpec(tuple(array.shape), np.dtype(array.dtype).name)


def copied(array: jax.Array) -> Any:
    """The values in host memory of their own: a later step may be given the device's memory, or the host's view of it."""
    host = np.asarray(array)
    return host.copy() if array.platform() == "cpu" else host


def assemble(shards: Iterable[Shard]) -> dict[str, Any]:
    """Whole host arrays from pieces of any mesh, by name. Raises CheckpointError if elements are missing."""
    return dict(assembled(shards))


def assembled(shards: Iterable[Shard]) -> Iterator[tuple[str, Any]]:
    """Each array as soon as its last piece has come; pieces of one array that follow each other are all that is held.

    Raises CheckpointError, at the end, if elements are missing.
    """
    whole: dict[str, Any] = {}
    filled: dict[str, int] = {}
    for shard in shards:
        dtype = jnp.dtype(shard.dtype)
        data = np.asarray(shard.data)
        if data.dtype != dtype:  # the bits of a dtype that numpy alone does not have
            data = data.view(dtype)
        array = whole.setdefault(shard.name, np.empty(shard.global_shape, dtype))
        array[tuple(slice(start, start + size) for start, size in zip(shard.offset, data.shape, strict=True))] = data
        filled[shard.name] = filled.get(shard.name, 0) + data.size
        if filled[shard.name] == array.size:
            yield shard.name, whole.pop(shard.name)
        del array
    for name, array in whole.items():
        if filled[name] < array.size:
            raise CheckpointError(
                f"the saved state lacks {array.size - filled[name]} elements of {name!r}",
                "give every shard of the state",
            )


def check_arrays(what: str, wanted: Mapping[str, ArraySpec], given: Mapping[str, ArraySpec]) -> None:
    """Raises CheckpointError, naming `what` and the first differences, unless names, shapes and dtypes are the same."""
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        problems = [
            f"{word}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"the saved state does not fit {what} ({'; '.join(problems)})", _SETTINGS)
    for name, spec in wanted.items():
        found = given[name]
        if tuple(found.shape) != spec.shape:
            raise CheckpointError(
                f"{name!r} was saved with shape {tuple(found.shape)} and has shape {spec.shape} here", _SETTINGS
            )
        if found.dtype != spec.dtype:
            raise CheckpointError(
                f"{name!r} was saved in {found.dtype} and is {spec.dtype} here",
                "build the model in the dtype that it was saved in, and convert it after loading",
            )
