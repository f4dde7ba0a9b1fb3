"""Collectives between processes, for values of user code: each process gives a local array and gets a local array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyaccel import wire
from polyaccel.collective_calls import Call, CollectiveCalls, different_calls
from polyaccel.errors import CollectiveError, UnsupportedError
from polyaccel.store import MemoryStore, Store
from polyaccel.topology import Topology
from polyaccel_jax.job import CoordinatorStore, job_of

_HEADER = 8  # bytes: the size of an object, and what it is exchanged for
_SMALL = 192  # bytes of an object that travel with the header
_WORDS = 256

_REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.max(0),
    "min": lambda stacked: stacked.min(0),
}


class JaxCollectives:
    """Runs on one device of every process. Every process must call each operation, in the same order.

    On CPUs an operation returns when it is done; on other devices those on arrays return before, as every computation of jax does.
    """

    def __init__(self, devices: Sequence[jax.Device], topology: Topology, timeout_s: float = 1800.0) -> None:
        first: dict[int, jax.Device] = {}
        for device in devices:
            first.setdefault(device.process_index, device)
        self._num_processes = topology.num_processes
        self._mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("process",))
        self._functions: dict[str, Callable[[jax.Array], jax.Array]] = {}
        self._job = job_of(topology, timeout_s) if topology.num_processes > 1 else None
        self.calls = CollectiveCalls() if self._job is None else self._job.calls

    def note_exchange(self) -> None:
        """Training begins an exchange of its own: a program that ends only if every process runs it."""
        if self._job is not None:
            self._job.num_exchanges += 1

    def all_gather(self, array: Any) -> jax.Array:
        """Concatenate along dim 0 over processes; a scalar gives shape (num_processes,).

        An array that is spread over the processes, such as a batch of a flax script, is whole already: every process gets all of it.
        """

        def gather() -> jax.Array:
            given = jnp.asarray(array)
            if _is_spread(given):
                return jnp.asarray(multihost_utils.process_allgather(given, tiled=True))
            stacked = self._apply("gather", _keep, given)
            return stacked if given.ndim == 0 else stacked.reshape(-1, *given.shape[1:])

        if self._job is not None:
            return self._run("all_gather", array, gather)
        with _types_of(array):
            whole = jnp.asarray(array)
            return whole.reshape(1) if whole.ndim == 0 else whole

    def whole(self, array: jax.Array) -> Any:
        """All of an array that is spread over the processes, as numpy. Every process must call it; one at a time is on the devices."""
        if self._job is None or not _is_spread(array):
            return np.asarray(array)
        gather: Any = multihost_utils.process_allgather
        return self._run("gathering of an array in pieces", array, lambda: gather(array, tiled=True))

    def all_reduce(self, array: Any, operation: Literal["sum", "mean", "max", "min"]) -> jax.Array:
        """Reduce elementwise over processes."""

        def reduce() -> jax.Array:
            return self._apply(operation, _REDUCTIONS[operation], _own(jnp.asarray(array), "reduce"))

        if self._job is not None:
            return self._run(f"all_reduce({operation})", array, reduce)
        with _types_of(array):
            return jnp.copy(jnp.asarray(array))

    def broadcast(self, array: Any, from_process: int) -> jax.Array:
        """The array of one process, on all of them."""

        def broadcast() -> jax.Array:
            name = f"from {from_process}"
            return self._apply(name, lambda stacked: stacked[from_process], _own(jnp.asarray(array), "broadcast"))

        if self._job is not None:
            return self._run(f"broadcast(from_process={from_process})", array, broadcast)
        with _types_of(array):
            return jnp.copy(jnp.asarray(array))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain values and arrays of all processes, in process order. Raises CollectiveError where processes call different things."""
        data = wire.encode(value)
        if self._job is None:
            return [wire.decode(data)]
        job = self._job
        with self.calls("all_gather_object") as call:
            sizes, rows = job.run(lambda: self._meet(call, data))
            if max(sizes) > _SMALL:
                padded = np.zeros(max(sizes), np.uint8)
                padded[: len(data)] = np.frombuffer(data, np.uint8)
                rows = job.run(lambda: np.asarray(self._apply("gather", _keep, padded)))
        return [wire.decode(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self, tag: str) -> None:
        """Return when every process has arrived at the barrier of this name; raises CollectiveError where one is at another."""
        if self._job is not None:
            with self.calls("barrier", tag) as call:
                self._job.run(lambda: self._meet(call, b""))

    def store(self) -> Store:
        """The key-value store of the coordination service, which takes calls from any thread."""
        return MemoryStore() if self._job is None else CoordinatorStore()

    def _run(self, operation: str, array: Any, work: Callable[[], jax.Array]) -> jax.Array:
        assert self._job is not None

        def typed() -> jax.Array:
            with _types_of(array):
                return work()

        with self.calls(operation, _described(array)):
            return self._job.run(typed)

    def _meet(self, call: Call, data: bytes) -> tuple[list[int], Any]:
        """Sizes and first bytes of everyone's data, once every process has come to this call."""
        what = "\n".join((call.name, call.operation, call.detail)).encode()
        row = np.zeros(_HEADER + _SMALL, np.uint8)
        row[:_HEADER] = np.frombuffer(np.array([len(data), crc32(what)], np.uint32).tobytes(), np.uint8)
        row[_HEADER : _HEADER + len(data)] = np.frombuffer(data[:_SMALL], np.uint8)
        rows = np.asarray(self._apply("gather", _keep, row))
        heads = np.ascontiguousarray(rows[:, :_HEADER]).view(np.uint32)
        if len(set(heads[:, 1].tolist())) > 1:
            words = (
                "\n".join((call.name, call.place, call.operation, call.detail)).encode()[:_WORDS].ljust(_WORDS, b"\0")
            )
            said = np.asarray(self._apply("gather", _keep, np.frombuffer(words, np.uint8)))
            calls = [_call_of(one.tobytes()) for one in said]
            raise CollectiveError(*different_calls(dict(enumerate(calls))))
        return heads[:, 0].tolist(), rows[:, _HEADER:]

    def _apply(self, name: str, function: Callable[[jax.Array], jax.Array], array: Any) -> jax.Array:
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


def _types_of(array: Any) -> AbstractContextManager[Any]:
    """64-bit types where the array has them: a torch script's int64 must not lose its upper half on the way."""
    wide = getattr(array, "dtype", None) is not None and np.dtype(array.dtype).itemsize >= 8
    return jax.enable_x64(True) if wide else nullcontext()


def _keep(stacked: jax.Array) -> jax.Array:
    return stacked


def _described(array: Any) -> str:
    return f"{tuple(getattr(array, 'shape', ()))} {getattr(array, 'dtype', type(array).__name__)}"


def _call_of(words: bytes) -> Call:
    name, place, operation, detail = [*words.rstrip(b"\0").decode("utf-8", "replace").split("\n"), "", "", ""][:4]
    return Call(name, place, operation, detail)
