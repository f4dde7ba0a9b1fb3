"""The devices of a job as a jax mesh, and how arrays lie on it: batches cut over the data axes, everything else on all devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from polyaccel.errors import PlanError, PrepareError

if TYPE_CHECKING:
    from polyaccel.plan import Plan

DATA_AXES = ("replica", "data", "fsdp")


def batch_size_of(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Dim 0 of the first array that has one: the batch size of the inputs of a program. None when all are scalars."""
    return next((shape[0] for shape in shapes if shape), None)


def carries_batch(shape: tuple[int, ...], batch_size: int | None) -> bool:
    """Whether an input of this shape is cut over data shards; all others are the same on every shard."""
    return bool(shape) and shape[0] == batch_size


class DeviceMesh:
    """All devices of all processes, arranged as the plan says.

    With one device in the job nothing is sharded and no mesh is involved: arrays lie on that device.
    """

    def __init__(self, plan: Plan, devices: Sequence[jax.Device]) -> None:
        sizes = plan.mesh.sizes
        self.mesh: Mesh = jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=list(devices)
        )
        self.num_processes = len({device.process_index for device in devices})
        self.num_shards = plan.num_data_shards
        self.num_local_shards = plan.num_local_data_shards
        self.is_single_device = len(devices) == 1
        self.local_devices = [device for device in self.mesh.devices.flat if device in self.mesh.local_devices]
        self.replicated: Sharding = NamedSharding(self.mesh, PartitionSpec())
        self.batch: Sharding = self.cut(0)
        if self.is_single_device:
            self.replicated = self.batch = SingleDeviceSharding(devices[0])
        # isinstance(x, jax.Array) takes ten times as long as a comparison of types, and is asked for every leaf of every batch.
        self._array_type = type(jax.device_put(np.float32(0), self.local_devices[0]))
        self._local_mesh = Mesh(np.array(self.local_devices), ("local",))

    def cut(self, axis: int) -> NamedSharding:
        """The sharding of an array whose dim `axis` is cut over the data shards."""
        return NamedSharding(self.mesh, self.spec(axis))

    def spec(self, axis: int | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dim `axis` is cut over the data shards (None: of one that is the same on all)."""
        return PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), DATA_AXES)

    # -- in ------------------------------------------------------------------------------------------------------------

    def replicate(self, values: Sequence[Any]) -> list[jax.Array]:
        """Copies of host or device arrays, equal on all processes, on every device."""
        # A transfer may hand out the same buffer again; what is donated later must be nobody else's.
        values = [jnp.copy(value) if isinstance(value, jax.Array) else value for value in values]
        if self.num_processes == 1:
            shardings = [self.replicated] * len(values)
            return list(jax.device_put(list(values), shardings, may_alias=False))
        return [_from_host(value, self.replicated) for value in values]

    def place(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """This process's part of a batch as global arrays; the transfer runs on while the caller goes on.

        Leaves whose dim 0 is the batch size (that of the first leaf with a dim) are cut over the data shards, all others are
        replicated. Arrays that already lie on the mesh stay as they are. A batch that does not divide over the shards is
        replicated in a job of one process, which serves evaluation; steps with gradients refuse it.
        """
        waiting = [index for index, leaf in enumerate(leaves) if not self.is_placed(leaf)]
        placed = list(leaves)
        if not waiting:
            return placed
        shapes = [tuple(np.shape(leaf)) for leaf in leaves]
        if self.num_processes > 1:
            batch_size = batch_size_of([shapes[index] for index in waiting])
            for index in waiting:
                placed[index] = self._from_this_process(leaves[index], shapes[index], batch_size)
            return placed
        batch_size = batch_size_of(shapes)
        divides = batch_size is not None and batch_size % self.num_shards == 0
        shardings = [
            self.batch if divides and carries_batch(shapes[index], batch_size) else self.replicated for index in waiting
        ]
        # Loaders reuse their memory (pinned rings, shared memory): an aliased batch would change under the step.
        arrays = jax.device_put([leaves[index] for index in waiting], shardings, may_alias=False)
        for index, array in zip(waiting, arrays, strict=True):
            placed[index] = array
        return placed

    def are_placed(self, leaves: Sequence[Any]) -> bool:
        """Whether all leaves are arrays that already lie on this mesh."""
        if self.is_single_device:
            kind = self._array_type
            for leaf in leaves:
                if type(leaf) is not kind:
                    return False
            return True
        return all([self.is_placed(leaf) for leaf in leaves])

    def is_placed(self, leaf: Any) -> bool:
        """Whether a leaf is an array that already lies on this mesh."""
        if not isinstance(leaf, jax.Array):
            return False
        if self.is_single_device:
            return True
        sharding = leaf.sharding
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh

    def _from_this_process(self, leaf: Any, shape: tuple[int, ...], batch_size: int | None) -> jax.Array:
        if not carries_batch(shape, batch_size):
            if shape and batch_size is not None and shape[0] == batch_size * self.num_processes:
                raise PrepareError(
                    f"an array of shape {shape} beside a batch of {batch_size} samples per process could be the whole batch of"
                    f" all {self.num_processes} processes or no batch at all",
                    "give every process its own samples, or add a leading dim of 1 to what is no batch",
                )
            return _from_host(leaf, self.replicated)
        self.check_divides(shape[0], self.num_local_shards)
        local = np.asarray(leaf)
        return jax.make_array_from_process_local_data(self.batch, local, (shape[0] * self.num_processes, *shape[1:]))

    def check_divides(self, batch_size: int, num_shards: int) -> None:
        """Raises PlanError when a batch cannot be cut into equal parts."""
        if batch_size % num_shards:
            raise PlanError(
                f"a batch of {batch_size} samples cannot be cut over {num_shards} data shards in equal parts",
                "use drop_last=True or even_batches=True in the loader, or a batch_size that divides by the data shards",
            )

    # -- out -----------------------------------------------------------------------------------------------------------

    def local(self, array: jax.Array) -> jax.Array:
        """This process's part of an array, as an array of its own devices (in a job of one process: the array itself)."""
        if array.is_fully_addressable:
            return array
        if array.is_fully_replicated:
            return array.addressable_data(0)
        axis = _cut_axis(array)
        pieces = _distinct_pieces(array, axis)
        shape = list(array.shape)
        shape[axis] = sum(piece.data.shape[axis] for piece in pieces)
        if len(pieces) == len(self.local_devices):
            sharding = NamedSharding(self._local_mesh, PartitionSpec(*([None] * axis), "local"))
            by_device = {piece.device: piece.data for piece in pieces}
            return jax.make_array_from_single_device_arrays(
                tuple(shape), sharding, [by_device[device] for device in self.local_devices]
            )
        return jax.device_put(np.concatenate([np.asarray(piece.data) for piece in pieces], axis))

    def to_host(self, array: jax.Array) -> np.ndarray[Any, Any]:
        """This process's part of an array as numpy; waits for the device."""
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        axis = _cut_axis(array)
        return np.concatenate([np.asarray(piece.data) for piece in _distinct_pieces(array, axis)], axis)


def _from_host(value: Any, sharding: Sharding) -> jax.Array:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _from_host(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.array(value)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _cut_axis(array: jax.Array) -> int:
    whole = array.shape
    piece = array.addressable_shards[0].data.shape
    return next(axis for axis in range(len(whole)) if piece[axis] != whole[axis])


def _distinct_pieces(array: jax.Array, axis: int) -> list[Any]:
    by_start = {shard.index[axis].start or 0: shard for shard in array.addressable_shards}
    return [by_start[start] for start in sorted(by_start)]
