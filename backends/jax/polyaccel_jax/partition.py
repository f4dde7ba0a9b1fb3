"""How one program runs on the mesh: a replica on every data shard with explicit averaging, or one program of global arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from polyaccel.protocols import ArraySpec, Program, ProgramCall, ProgramResult

from polyaccel_jax.mesh import DATA_AXES, DeviceMesh, batch_size_of, carries_batch

Specs = tuple[ArraySpec, ...]


def specs_of(inputs: Sequence[Any]) -> Specs:
    """Shapes and dtypes of arrays or tracers."""
    return tuple([ArraySpec(tuple(array.shape), array.dtype.name) for array in inputs])


@dataclass(frozen=True, slots=True)
class Layout:
    """How the inputs of one program are cut: `num_replicas` replicas, or one program (1) that spans the mesh."""

    specs: Specs  # global
    num_replicas: int
    cut: tuple[bool, ...]  # per input: whether its dim 0 is cut over the data shards

    @property
    def replica_specs(self) -> Specs:
        """What one replica sees."""
        return tuple(
            ArraySpec((spec.shape[0] // self.num_replicas, *spec.shape[1:]), spec.dtype) if cut else spec
            for spec, cut in zip(self.specs, self.cut, strict=True)
        )


def layout_of(mesh: DeviceMesh, partitioning: str, specs: Specs, *, with_grads: bool) -> Layout:
    """The layout of inputs with these global specs.

    Raises PlanError for a training batch that does not divide over the data shards; without gradients such a batch is
    computed as a whole on every device.
    """
    batch_size = batch_size_of([spec.shape for spec in specs])
    if mesh.num_shards == 1 or batch_size is None:
        return Layout(specs, 1, (False,) * len(specs))
    if with_grads:
        mesh.check_divides(batch_size, mesh.num_shards)
    elif batch_size % mesh.num_shards:
        return Layout(specs, 1, (False,) * len(specs))
    cut = tuple(carries_batch(spec.shape, batch_size) for spec in specs)
    return Layout(specs, mesh.num_shards if partitioning == "pmap" else 1, cut)


def build(mesh: DeviceMesh, layout: Layout, call: ProgramCall, *, with_grads: bool) -> Program:
    """The program of a call for this layout."""
    specs = layout.specs if call.is_global else layout.replica_specs
    return call.build(
        specs, with_grads=with_grads, num_shards=layout.num_replicas, shard_call=_shard_call(mesh, layout.num_replicas)
    )


def run(
    mesh: DeviceMesh,
    layout: Layout,
    program: Program,
    is_global: bool,
    params: dict[str, jax.Array],
    buffers: dict[str, jax.Array],
    key: jax.Array,
    inputs: Sequence[jax.Array],
    loss_scale: jax.Array | None,
) -> ProgramResult:
    """Run a program on global arrays inside a trace; gradients and buffers come out equal on all devices."""
    if layout.num_replicas > 1 and not is_global:
        return _run_replicas(mesh, layout, program, params, buffers, key, inputs, loss_scale)
    inputs = [
        _lay(mesh, value, 0 if cut else None) if not mesh.is_single_device else value
        for value, cut in zip(inputs, layout.cut, strict=True)
    ]
    result = program(params, buffers, key, inputs, loss_scale)
    if not mesh.is_single_device:
        result.loss = None if result.loss is None else _lay(mesh, result.loss, None)
        result.outputs = [
            _lay(mesh, value, axis) for value, axis in zip(result.outputs, program.output_axes, strict=True)
        ]
        result.grads = {name: _lay(mesh, value, None) for name, value in result.grads.items()}
        result.buffers = {name: _lay(mesh, value, None) for name, value in result.buffers.items()}
    return result


def _lay(mesh: DeviceMesh, value: jax.Array, axis: int | None) -> jax.Array:
    if axis is not None and value.shape[axis] % mesh.num_shards:
        axis = None
    return lax.with_sharding_constraint(value, NamedSharding(mesh.mesh, mesh.spec(axis)))


def _run_replicas(
    mesh: DeviceMesh,
    layout: Layout,
    program: Program,
    params: dict[str, jax.Array],
    buffers: dict[str, jax.Array],
    key: jax.Array,
    inputs: Sequence[jax.Array],
    loss_scale: jax.Array | None,
) -> ProgramResult:
    def replica(params: Any, buffers: Any, key: Any, inputs: Any, loss_scale: Any) -> tuple[Any, ...]:
        index = lax.axis_index(DATA_AXES)
        result = program(params, buffers, jax.random.fold_in(key, index), inputs, loss_scale)
        outputs = [
            _over_shards(value) if axis is None else value
            for value, axis in zip(result.outputs, program.output_axes, strict=True)
        ]
        loss, grads = lax.pmean((result.loss, result.grads), DATA_AXES)
        return loss, outputs, grads, _of_first_shard(result.buffers, index)

    loss, outputs, grads, new_buffers = jax.shard_map(
        replica,
        mesh=mesh.mesh,
        in_specs=(mesh.spec(None),) * 3 + ([mesh.spec(0 if cut else None) for cut in layout.cut], mesh.spec(None)),
        out_specs=(mesh.spec(None), [mesh.spec(axis) for axis in program.output_axes], mesh.spec(None), mesh.spec(None)),
        check_vma=False,  # replicas differentiate on their own; the averaging above is all there is between them
    )(params, buffers, key, list(inputs), loss_scale)
    return ProgramResult(loss, outputs, grads, new_buffers)


def _over_shards(value: jax.Array) -> jax.Array:
    """One value per shard -> one for all: the mean of floats, the sum of integers and booleans."""
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return lax.pmean(value, DATA_AXES)
    return lax.psum(value.astype(jnp.int32) if value.dtype == jnp.bool_ else value, DATA_AXES)


def _of_first_shard(values: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
    """The values of shard 0 on all of them: what DistributedDataParallel's broadcast_buffers keeps."""

    def masked(value: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        value = value.astype(jnp.int32) if value.dtype == jnp.bool_ else value
        return jnp.where(index == 0, value, jnp.zeros_like(value))

    def restored(value: jax.Array, like: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
        return value.astype(like.dtype)

    summed = lax.psum({name: masked(value) for name, value in values.items()}, DATA_AXES)
    return {name: restored(summed[name], value) for name, value in values.items()}


def _shard_call(mesh: DeviceMesh, num_replicas: int) -> Callable[..., Callable[..., tuple[jax.Array, ...]]]:
    """The ShardCall that a global program cuts its replica parts with."""

    def shard_call(
        function: Callable[..., tuple[jax.Array, ...]],
        in_axes: Sequence[int | None],
        out_axes: Sequence[int | None | str],
    ) -> Callable[..., tuple[jax.Array, ...]]:
        if num_replicas == 1:
            return lambda *arrays: function(jnp.int32(0), *arrays)

        def replica(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            index = lax.axis_index(DATA_AXES)
            return tuple(_joined(value, axis, index) for value, axis in zip(function(index, *arrays), out_axes, strict=True))

        return jax.shard_map(
            replica,
            mesh=mesh.mesh,
            in_specs=tuple(mesh.spec(axis) for axis in in_axes),
            out_specs=tuple(mesh.spec(axis if isinstance(axis, int) else None) for axis in out_axes),
            check_vma=False,
        )

    return shard_call


def _joined(value: jax.Array, axis: int | None | str, index: jax.Array) -> jax.Array:
    if axis == "mean":
        return lax.pmean(value, DATA_AXES)
    if axis == "sum":
        return lax.psum(value.astype(jnp.int32) if value.dtype == jnp.bool_ else value, DATA_AXES)
    return value if isinstance(axis, int) else _of_first_shard({"value": value}, index)["value"]
