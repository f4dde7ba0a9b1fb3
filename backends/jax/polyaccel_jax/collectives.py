"""Collectives between processes, for values of user code: each process gives a local array and gets a local array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the job's key-value store has no public name; orbax takes it from here, too
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyaccel import wire
from polyaccel.errors import UnsupportedError
from polyaccel.store import MemoryStore, Store
from polyaccel.topology import Topology

_REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.max(0),
    "min": lambda stacked: stacked.min(0),
}


class JaxCollectives:
    """Runs on one device of every process. Every process must call each operation, in the same order."""

    def __init__(self, devices: Sequence[jax.Device], topology: Topology) -> None:
        first: dict[int, jax.Device] = {}
        for device in devices:
            first.setdefault(device.process_index, device)
        self._num_processes = topology.num_processes
        self._mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("process",))
        self._functions: dict[str, Callable[[jax.Array], jax.Array]] = {}

    def all_gather(self, array: Any) -> jax.Array:
        """Concatenate along dim 0 over processes; a scalar gives shape (num_processes,).

        An array that is spread over the processes, such as a batch of a flax script, is whole already: every process gets all of it.
        """
        with _types_of(array):
            array = jnp.asarray(array)
            if self._num_processes == 1:
                return array.reshape(1) if array.ndim == 0 else array
            if _is_spread(array):
                return jnp.asarray(multihost_utils.process_allgather(array, tiled=True))
            stacked = self._apply("gather", _keep, array)
            return stacked if array.ndim == 0 else stacked.reshape(-1, *array.shape[1:])

    def all_reduce(self, array: Any, operation: Literal["sum", "mean", "max", "min"]) -> jax.Array:
        """Reduce elementwise over processes."""
        with _types_of(array):
            array = _own(jnp.asarray(array), "reduce")
            return (
                jnp.copy(array) if self._num_processes == 1 else self._apply(operation, _REDUCTIONS[operation], array)
            )

    def broadcast(self, array: Any, from_process: int) -> jax.Array:
        """The array of one process, on all of them."""
        with _types_of(array):
            array = _own(jnp.asarray(array), "broadcast")
            if self._num_processes == 1:
                return jnp.copy(array)
            return self._apply(f"from {from_process}", lambda stacked: stacked[from_process], array)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order."""
        if self._num_processes == 1:
            return [wire.decode(wire.encode(value))]
        data = np.frombuffer(wire.encode(value), np.uint8)
        sizes = np.asarray(self.all_gather(np.int32(data.size)))
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: data.size] = data
        rows = np.asarray(self.all_gather(padded)).reshape(self._num_processes, -1)
        return [wire.decode(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self, tag: str) -> None:
        """Return when every process has arrived at the barrier of this name."""
        if self._num_processes > 1:
            multihost_utils.sync_global_devices(tag)

    def store(self) -> Store:
        """The key-value store of the coordination service, which takes calls from any thread."""
        return MemoryStore() if self._num_processes == 1 else CoordinatorStore()

    def _apply(self, name: str, function: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        sharding = NamedSharding(self._mesh, PartitionSpec("process"))
        shape = (self._num_processes, *array.shape)
        mine = self._mesh.local_devices[0]
        row = jax.device_put(np.asarray(array)[None], mine)
        stacked = jax.make_array_from_single_device_arrays(shape, sharding, [row])
        jitted = self._functions.get(name)
        if jitted is None:
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            jitted = self._functions[name] = jax.jit(function, out_shardings=everywhere)
        return jitted(stacked).addressable_data(0)


def _is_spread(array: jax.Array) -> bool:
    """Whether this process holds a part of it only."""
    return not array.is_fully_addressable and not array.is_fully_replicated


def _own(array: jax.Array, name: str) -> jax.Array:
    if _is_spread(array):
        raise UnsupportedError(
            f"{name} takes one array of every process, and got one of shape {array.shape} that is spread over all of them",
            "it is the global array already: compute with it as it is, or get all of it with accelerator.gather",
        )
    return array


class CoordinatorStore:
    """See `polyaccel.store.Store`."""

    def __init__(self) -> None:
        client = distributed.global_state.client
        assert client is not None  # a job of several processes has one
        self._client = client

    def set(self, key: str, value: str) -> None:
        """Write a text for all processes."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        """The text of this key, or None; does not wait."""
        try:
            text: str = self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith("NOT_FOUND"):
                return None
            raise
        return text


def _types_of(array: Any) -> AbstractContextManager[Any]:
    """64-bit types where the array has them: a torch script's int64 must not lose its upper half on the way."""
    wide = getattr(array, "dtype", None) is not None and np.dtype(array.dtype).itemsize >= 8
    return jax.enable_x64(True) if wide else nullcontext()


def _keep(stacked: jax.Array) -> jax.Array:
    return stacked
