"""The devices of a job as a jax mesh, and how arrays lie on it: batches over the data axes, what is kept over `fsdp` and `tensor`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from polyaccel.errors import PlanError, PrepareError
from polyaccel.sharding.plan import ModelHints, ShardingPlan, plan_shardings, say_unused_rules, with_fsdp
from polyaccel.sharding.rules import Spec
from polyaccel_jax import pieces

if TYPE_CHECKING:
    from polyaccel.plan import Plan
    from polyaccel_jax.planning.planner import Planner

DATA_AXES = ("replica", "data", "fsdp")


def batch_size_of(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Dim 0 of the first array that has one: the batch size of the inputs of a program. None when all are scalars."""
    return next((shape[0] for shape in shapes if shape), None)


def axes_of(shapes: Sequence[tuple[int, ...]]) -> list[int | None]:
    """Per input the dim that is cut over data shards, where nobody says it: dim 0 of those that carry the batch size there."""
    batch_size = batch_size_of(shapes)
    return [0 if shape and shape[0] == batch_size else None for shape in shapes]


class DeviceMesh:
    """All devices of all processes, arranged as the plan says.

    With one device in the job nothing is sharded and no mesh is involved: arrays lie on that device. With a planner the devices
    need not exist: its shapes stand in place of arrays, and one process is taken to drive all of them.
    """

    def __init__(self, plan: Plan, devices: Sequence[jax.Device], planner: Planner | None = None) -> None:
        self.planner = planner
        sizes = plan.mesh.sizes
        self.num_processes = 1 if planner is not None else len({device.process_index for device in devices})
        self.mesh: Mesh = _arranged(plan, list(devices), self.num_processes)
        self.num_shards = plan.num_data_shards
        self.num_local_shards = plan.num_local_data_shards
        # Neighbouring processes whose devices share a data shard have the same rows, and are one feed.
        self.num_feeds = 1 if planner is not None else self.num_shards // self.num_local_shards
        self.feed = plan.first_data_shard // self.num_local_shards
        self.sizes = sizes
        self.num_parts = sizes["fsdp"] * sizes["tensor"]  # of what is kept: parameters, gradients and optimizer state
        self.cuts_layers = sizes["tensor"] > 1
        self.cuts_sequences = sizes["sequence"] > 1
        self._rules = plan.sharding_rules
        self._names: dict[str, tuple[str, ...]] = {}  # of the parameters of all models
        self._has_said_rules = False
        self._specs: dict[str, Spec] = {}  # of the parameters of all models, by `<model>.<name>`
        self._uneven: dict[str, Spec] = {}  # of those that cannot be kept in equal parts
        self.is_single_device = len(devices) == 1
        self.platform = devices[0].platform
        every: list[jax.Device] = list(self.mesh.devices.flat)
        self.local_devices = every if planner is not None else [d for d in every if d in self.mesh.local_devices]
        self.replicated: Sharding = NamedSharding(self.mesh, PartitionSpec())
        self.batch: Sharding = self.cut(0)
        if self.is_single_device:
            self.replicated = self.batch = SingleDeviceSharding(devices[0])
        self._host_copies: dict[int, tuple[weakref.ref[jax.Array], tuple[str, int] | None]] = {}
        self._is_lone = False
        self._array_type: type = jax.ShapeDtypeStruct
        if planner is not None:
            self._array_type = planner.array_type
            return
        # No array of this process can lie anywhere else.
        self._is_lone = self.is_single_device and jax.local_device_count() == 1 and devices[0].platform == "cpu"
        # isinstance(x, jax.Array) takes ten times as long as a comparison of types, and is asked for every leaf of every batch.
        self._array_type = type(jax.device_put(np.float32(0), self.local_devices[0]))

    def cut(self, axis: int) -> NamedSharding:
        """The sharding of an array whose dim `axis` is cut over the data shards."""
        return NamedSharding(self.mesh, self.spec(axis))

    def spec(self, axis: int | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dim `axis` is cut over the data shards (None: of one that is the same on all)."""
        return PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), DATA_AXES)

    def plan_parameters(self, shapes: Mapping[str, Sequence[int]], hints: ModelHints | None = None) -> ShardingPlan:
        """How parameters of these names and shapes are cut. Raises PlanError, naming a parameter, for a rule that cannot hold."""
        return plan_shardings(shapes, self.sizes, self._rules, hints)

    def lay_out(self, model: str, specs: Mapping[str, Any], hints: ModelHints | None = None) -> None:
        """Fix how the parameters of a model lie, and all that is named after them: gradients, optimizer state, averages."""
        self._names[model] = tuple(specs)
        if self.num_parts == 1:
            return
        plan = self.plan_parameters({name: tuple(spec.shape) for name, spec in specs.items()}, hints)
        plan.say(model, self.sizes)
        self._specs.update({f"{model}.{name}": spec for name, spec in plan.specs.items()})
        self._uneven.update({f"{model}.{name}": spec for name, spec in plan.uneven.items()})

    def say_unused_rules(self) -> None:
        """Log, once, the script's rules that match no parameter of any model."""
        if not self._has_said_rules:
            self._has_said_rules = True
            say_unused_rules(self._rules, [name for names in self._names.values() for name in names])

    def spec_of(self, shape: Sequence[int], name: str | None = None) -> Spec:
        """Per dim the axis that cuts an array that is kept: that of its parameter `<model>.<name>`, where it has its dims.

        For what belongs to no parameter, the largest dim that divides over `fsdp` (the first of equal ones), if there is one.
        """
        found = self._specs.get(name) if name is not None else None
        if found is not None and len(found) == len(shape):
            # Statistics of rows or columns (Adafactor) have the parameter's dims, some of them of size 1.
            sizes = self.sizes
            return tuple(
                axis if axis and size % sizes[axis] == 0 else None for size, axis in zip(shape, found, strict=True)
            )
        return with_fsdp(shape, (None,) * len(shape), self.sizes["fsdp"])

    def kept_axis(self, shape: Sequence[int], name: str | None = None) -> int | None:
        """The dim along which an array that is kept is cut over `fsdp`; None where it is not."""
        spec = self.spec_of(shape, name)
        return spec.index("fsdp") if "fsdp" in spec else None

    def kept_spec(self, shape: Sequence[int], name: str | None = None) -> PartitionSpec:
        """The PartitionSpec of an array of this shape that is kept from step to step."""
        return as_partition(self.spec_of(shape, name))

    def used_spec(self, shape: Sequence[int], name: str) -> Spec:
        """How a parameter lies while a global program uses it: gathered over `fsdp`, cut over `tensor`.

        The pieces are as equal as they can be: a vocabulary of an odd size is kept whole, and what is computed from it is cut.
        """
        spec = self._uneven.get(name) or self.spec_of(shape, name)
        return tuple(None if axis == "fsdp" else axis for axis in spec)

    def kept(self, value: Any, name: str | None = None) -> Sharding:
        """How an array that is kept from step to step lies; `value` is the array, a tracer, or its shape and dtype."""
        if self.num_parts == 1 or jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return self.replicated
        return self.sharding_of(self.spec_of(value.shape, name))

    def sharding_of(self, spec: Spec) -> NamedSharding:
        """The sharding of a parameter with this spec."""
        return NamedSharding(self.mesh, as_partition(spec))

    # -- in ------------------------------------------------------------------------------------------------------------

    def keep(self, values: Iterable[Any], names: Iterable[str | None]) -> list[jax.Array]:
        """Copies of host or device arrays, equal on all processes, each cut as its parameter is; every device gets its part alone.

        The values are taken one by one: where they are made when they are asked for, no two of them are whole at a time.
        """
        if self.planner is not None:
            return [self.planner.array(value, self.kept, name) for value, name in zip(values, names, strict=True)]
        if self.num_parts == 1:
            return self.replicate(list(values))
        copies: list[jax.Array] = []
        following = iter(names)
        for value in values:  # no zip, which holds on to the value before
            name = next(following)
            value = value if hasattr(value, "dtype") else np.asarray(value)
            sharding = self.kept(value, name)
            if isinstance(value, jax.Array) and value.sharding == sharding:
                copies.append(jnp.copy(value))  # in its parts
            elif self.num_processes > 1:
                copies.append(pieces.laid_anew(value, sharding))
            else:
                host = value if isinstance(value, jax.Array) else np.array(value)
                copies.append(jax.device_put(host, sharding, may_alias=False))
                copies[-1].block_until_ready()  # the host's copy goes before the next one comes
        return copies

    def made(self, make: Callable[..., Any], names: Iterable[str | None], *args: Any) -> Any:
        """The tree of arrays that a traceable function makes, computed where they are kept, each device its own part.

        `names`: per leaf the parameter whose layout it has, as in `keep`.
        """
        shapes, treedef = jax.tree.flatten(jax.eval_shape(make, *args))
        if self.planner is not None:
            return jax.tree.unflatten(treedef, self.keep(shapes, names))
        kept = [self.kept(shape, name) for shape, name in zip(shapes, names, strict=True)]
        return jax.jit(make, out_shardings=jax.tree.unflatten(treedef, kept))(*args)

    def replicate(self, values: Sequence[Any]) -> list[jax.Array]:
        """Copies of host or device arrays, equal on all processes, on every device."""
        if self.planner is not None:
            return [self.planner.laid(value, self.replicated) for value in values]
        # A transfer may hand out the same buffer again, and reads host memory later; what is donated must be nobody else's.
        values = [jnp.copy(value) if isinstance(value, jax.Array) else np.array(value) for value in values]
        if self.num_processes == 1:
            shardings = [self.replicated] * len(values)
            return list(jax.device_put(list(values), shardings, may_alias=False))
        return [pieces.from_host(value, self.replicated) for value in values]

    def place(self, leaves: Sequence[Any], axes: Sequence[int | None] | None = None) -> list[jax.Array]:
        """This process's part of a batch as global arrays; the transfer runs on while the caller goes on.

        `axes`: per leaf the dim that is cut over the data shards (None: replicated); by default dim 0 of the leaves that have
        the batch size there, which is that of the first leaf with a dim. Arrays that already lie on the mesh stay as they
        are. A batch that does not divide over the shards is replicated in a job of one process, which serves evaluation;
        steps with gradients refuse it.
        """
        placed = list(leaves)
        if self.are_placed(leaves):
            return placed
        waiting = [index for index, leaf in enumerate(leaves) if not self.is_placed(leaf)]
        shapes = [tuple(np.shape(leaf)) for leaf in leaves]
        if self.num_processes > 1:
            known = axes is not None
            if axes is None:  # what is placed already has global shapes, and says nothing about this process's batch
                local = iter(axes_of([shapes[index] for index in waiting]))
                axes = [next(local) if index in waiting else None for index in range(len(leaves))]
            batch_size = next((shapes[index][axes[index] or 0] for index in waiting if axes[index] is not None), None)
            for index in waiting:
                axis = axes[index]
                if axis is None and not known:
                    self._refuse_ambiguous(shapes[index], batch_size)
                placed[index] = self._from_this_process(leaves[index], shapes[index], axis)
            return placed
        axes = axes_of(shapes) if axes is None else axes
        shardings = [self._sharding(shapes[index], axes[index]) for index in waiting]
        if self.planner is not None:
            for index, sharding in zip(waiting, shardings, strict=True):
                placed[index] = self.planner.laid(leaves[index], sharding)
            return placed
        # Loaders reuse their memory (rings, shared memory), and a transfer reads it later or never copies it: without a copy the
        # batch would change under the step.
        arrays = jax.device_put([_snapshot(leaves[index]) for index in waiting], shardings)
        for index, array in zip(waiting, arrays, strict=True):
            placed[index] = array
        return placed

    def _sharding(self, shape: tuple[int, ...], axis: int | None) -> Sharding:
        if self.is_single_device or axis is None or shape[axis] % self.num_shards:
            return self.replicated
        return self.batch if axis == 0 else self.cut(axis)

    def are_placed(self, leaves: Sequence[Any]) -> bool:
        """Whether all leaves are arrays that already lie on this mesh."""
        if self._is_lone:
            kind = self._array_type
            return all([type(leaf) is kind for leaf in leaves])  # noqa: C419 - half the time of a generator
        return all(self.is_placed(leaf) for leaf in leaves)

    def is_placed(self, leaf: Any) -> bool:
        """Whether a leaf is an array that already lies on this mesh."""
        if self.planner is not None:
            return isinstance(leaf, self._array_type)
        if not isinstance(leaf, jax.Array):
            return False
        sharding = leaf.sharding
        if self.is_single_device:
            return not leaf.committed or sharding == self.replicated
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh

    def _from_this_process(self, leaf: Any, shape: tuple[int, ...], axis: int | None) -> jax.Array:
        if axis is None:
            made = pieces.from_host(leaf, self.replicated)
            key, copies = id(made), self._host_copies
            copies[key] = weakref.ref(made, lambda _: copies.pop(key, None)), _value_of(leaf)
            return made
        if self.num_feeds == 1 and shape[axis] % self.num_shards:  # every process has all of it
            return pieces.from_host(leaf, self.replicated)
        self.check_divides(shape[axis], self.num_local_shards)
        return pieces.from_rows(leaf, self.cut(axis), axis, self.feed, self.num_feeds)

    def is_host_copy(self, array: Any) -> bool:
        """Whether an array that is to be the same on all processes is made of what each of them had on its host."""
        known = self._host_copies.get(id(array))
        return known is not None and known[0]() is array

    def host_value(self, array: Any) -> tuple[str, int] | None:
        """Of a host copy: what it is in words, and a checksum of its value. None for any other array, and one that devices computed."""
        return self._host_copies[id(array)][1] if self.is_host_copy(array) else None

    def _refuse_ambiguous(self, shape: tuple[int, ...], batch_size: int | None) -> None:
        if shape and batch_size is not None and shape[0] == batch_size * self.num_feeds:
            raise PrepareError(
                f"an array of shape {shape} beside a batch of {batch_size} samples per process could be the whole batch of"
                f" all {self.num_processes} processes or no batch at all",
                "give every process its own samples, or add a leading dim of 1 to what is no batch",
            )

    def check_divides(self, batch_size: int, num_shards: int) -> None:
        """Raises PlanError when a batch cannot be cut into equal parts."""
        if batch_size % num_shards:
            raise PlanError(
                f"a batch of {batch_size} samples cannot be cut over {num_shards} data shards in equal parts",
                "use drop_last=True or even_batches=True in the loader, or a batch_size that divides by the data shards",
            )

    def check_length(self, length: int) -> None:
        """Raises PlanError when sequences cannot be cut into equal parts."""
        if length % self.sizes["sequence"]:
            raise PlanError(
                f"sequences of {length} cannot be cut over mesh.sequence={self.sizes['sequence']} in equal parts",
                "pad them to a multiple, or choose another mesh",
            )

    # -- out -----------------------------------------------------------------------------------------------------------

    def local(self, array: jax.Array) -> jax.Array:
        """This process's part of an array, as an array of its own devices (in a job of one process: the array itself)."""
        if self.planner is not None or array.is_fully_addressable:
            return array
        return array.addressable_data(0) if array.is_fully_replicated else pieces.local(array, self.local_devices)

    def to_host(self, array: jax.Array) -> np.ndarray[Any, Any]:
        """This process's part of an array as numpy; waits for the device."""
        if self.planner is not None:
            return np.asarray(array)
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return pieces.local_to_host(array)


def as_partition(spec: Spec) -> PartitionSpec:
    """Without the dims at the end that nothing cuts: jax compares specs as they are written."""
    last = max((dim for dim, axis in enumerate(spec) if axis), default=-1)
    return PartitionSpec(*spec[: last + 1])


def _arranged(plan: Plan, devices: list[jax.Device], num_processes: int) -> Mesh:
    """The mesh of these devices, as jax would lay it on the hardware; of several processes so that each drives the data shards that
    the plan says."""
    sizes = plan.mesh.sizes
    axis_types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)
    if num_processes == 1:
        return mesh
    rows = mesh.devices.reshape(plan.num_data_shards, -1)
    first = plan.first_data_shard
    fed = {row for row, held in enumerate(rows) if any(device in mesh.local_devices for device in held)}
    if fed == set(range(first, first + plan.num_local_data_shards)):
        return mesh
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(in_order).reshape(tuple(sizes.values())), tuple(sizes), axis_types=axis_types)


def _snapshot(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _value_of(leaf: Any) -> tuple[str, int] | None:
    if isinstance(leaf, jax.Array):
        return None
    host = np.asarray(leaf)
    words = f"{host.dtype.name} of shape {host.shape}"
    if host.size == 1:
        words = f"{words}, {host.item()!r}"
    return words, crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
