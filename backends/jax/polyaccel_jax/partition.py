"""How one program runs on the mesh: a replica on every data shard with explicit averaging, or one program of global arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout as memory
from jax.sharding import NamedSharding

from polyaccel.errors import PlanError
from polyaccel.protocols import ArraySpec, Program, ProgramCall, ProgramResult
from polyaccel_jax.constraints import Constrainer
from polyaccel_jax.late_gathers import Whole, run_with_late_gathers
from polyaccel_jax.mesh import DATA_AXES, DeviceMesh, as_partition, axes_of
from polyaccel_jax.sequences import Sequences, labels_of_inputs
from polyaccel_jax.splits import LENGTH, Labels, Split

Specs = tuple[ArraySpec, ...]
Named = dict[str, jax.Array]
_TPU_LANES = 128  # elements of the innermost dim that lie together


def specs_of(inputs: Sequence[Any]) -> Specs:
    """Shapes and dtypes of arrays or tracers."""
    return tuple([ArraySpec(tuple(array.shape), array.dtype.name) for array in inputs])


@dataclass(frozen=True, slots=True)
class Layout:
    """How the inputs of one program are cut: `num_replicas` replicas, or one program (1) that spans the mesh."""

    specs: Specs  # global
    num_replicas: int
    axes: tuple[int | None, ...]  # per input: the dim that is cut over the data shards
    labels: tuple[Labels, ...] | None = (
        None  # per input: the dims that follow batch and sequence, where `sequence` cuts
    )

    @property
    def replica_specs(self) -> Specs:
        """What one replica sees."""
        return tuple(self._part(spec, axis) for spec, axis in zip(self.specs, self.axes, strict=True))

    def _part(self, spec: ArraySpec, axis: int | None) -> ArraySpec:
        if axis is None:
            return spec
        shape = list(spec.shape)
        shape[axis] //= self.num_replicas
        return ArraySpec(tuple(shape), spec.dtype)


def layout_of(
    mesh: DeviceMesh,
    partitioning: str,
    specs: Specs,
    axes: Sequence[int | None] | None,
    *,
    with_grads: bool,
    is_piece: bool = False,
) -> Layout:
    """The layout of inputs with these global specs, cut along `axes` (None: as `axes_of` says).

    Raises PlanError for a training batch that does not divide over the data shards, and for sequences that do not divide over
    `sequence`; without gradients such a batch is computed as a whole on every device, and so is a piece of a step (`is_piece`), whose
    inputs are what other pieces gave.
    """
    if with_grads:  # all models of the script are there
        mesh.say_unused_rules()
    whole = Layout(specs, 1, (None,) * len(specs))
    if mesh.num_shards == 1 and not mesh.cuts_sequences:
        return whole
    axes = axes_of([spec.shape for spec in specs]) if axes is None else axes
    sizes = [spec.shape[axis] for spec, axis in zip(specs, axes, strict=True) if axis is not None]
    for size in sizes:
        if with_grads:
            mesh.check_divides(size, mesh.num_shards)
        elif size % mesh.num_shards:
            return whole
    labels = _labels_of(mesh, specs, axes, is_strict=with_grads and not is_piece) if mesh.cuts_sequences else None
    return Layout(specs, mesh.num_shards if partitioning == "pmap" and sizes else 1, tuple(axes), labels)


def _labels_of(
    mesh: DeviceMesh, specs: Specs, axes: Sequence[int | None], *, is_strict: bool
) -> tuple[Labels, ...] | None:
    """Where the inputs have batch and sequences; None where a program that may be computed whole gets some that do not divide."""
    is_integer = [jnp.issubdtype(jnp.dtype(spec.dtype), jnp.integer) for spec in specs]
    labels = labels_of_inputs([spec.shape for spec in specs], axes, is_integer)
    lengths = {spec.shape[1] for spec, found in zip(specs, labels, strict=True) if LENGTH in found}
    if is_strict and not lengths:
        raise PlanError(
            f"mesh.sequence={mesh.sizes['sequence']} finds no sequences among the inputs, of shapes"
            f" {', '.join(str(spec.shape) for spec in specs)}",
            "give the step inputs of (batch, length, ...), or use another axis of the mesh",
        )
    for length in lengths:
        if is_strict:
            mesh.check_length(length)
        elif length % mesh.sizes["sequence"]:
            return None
    return tuple(labels)


class Arguments(NamedTuple):
    """What a program is called with."""

    params: Named
    buffers: Named
    key: jax.Array
    inputs: list[jax.Array]
    loss_scale: jax.Array | None


def build(mesh: DeviceMesh, layout: Layout, call: ProgramCall, *, with_grads: bool) -> Program:
    """The program of a call for this layout."""
    specs = layout.specs if call.is_global else layout.replica_specs
    return call.build(
        specs, with_grads=with_grads, num_shards=layout.num_replicas, shard_call=ReplicaCall(mesh, layout.num_replicas)
    )


def run(mesh: DeviceMesh, layout: Layout, program: Program, is_global: bool, args: Arguments) -> ProgramResult:
    """Run a program on global arrays inside a trace; gradients and buffers come out equal on all devices."""
    if layout.num_replicas > 1 and not is_global:
        return _run_replicas(mesh, layout, program, args)
    return _run_globally(mesh, layout, program, args)


def _fields(program: Program, *args: Any) -> tuple[Any, ...]:
    """What a program returns, as jax knows it."""
    result = program(*args)
    return result.loss, result.outputs, result.grads, result.buffers


# -- one program of global arrays ------------------------------------------------------------------------------------------


def _run_globally(mesh: DeviceMesh, layout: Layout, program: Program, args: Arguments) -> ProgramResult:
    if mesh.is_single_device:
        return program(*args)
    run: Callable[..., Any] = functools.partial(_fields, program)
    if layout.labels is not None:
        inputs = [
            Sequences(mesh).constrained(Split(*one)).value for one in zip(args.inputs, layout.labels, strict=True)
        ]
    else:
        inputs = [_lay(mesh, value, axis) for value, axis in zip(args.inputs, layout.axes, strict=True)]
    if mesh.cuts_layers or layout.labels is not None:
        run = functools.partial(_constrained, mesh, layout, run)

    def laid(*args: Any) -> tuple[Any, ...]:
        loss, outputs, grads, buffers = run(*args)
        return (
            None if loss is None else _lay(mesh, loss, None),
            [_lay(mesh, value, axis) for value, axis in zip(outputs, program.output_axes, strict=True)],
            {name: lax.with_sharding_constraint(value, mesh.kept(value, name)) for name, value in grads.items()},
            {name: _lay(mesh, value, None) for name, value in buffers.items()},
        )

    args = args._replace(inputs=inputs)
    if mesh.num_parts == 1:
        return ProgramResult(*laid(*args))
    if layout.num_replicas > 1:  # model calls in pieces that run on every data shard: each uses all parameters at once
        return ProgramResult(*laid(_used(mesh, args.params), *args[1:]))
    return ProgramResult(*_gathering(mesh, laid, *args))


def _used(mesh: DeviceMesh, params: Named) -> Named:
    """Parameters that are whole over `fsdp`, for XLA to gather.

    Without a word, the partitioner may cut layers instead, along dims that nobody chose.
    """
    return {
        name: lax.with_sharding_constraint(value, mesh.sharding_of(mesh.used_spec(value.shape, name)))
        for name, value in params.items()
    }


def _gathering(mesh: DeviceMesh, run: Callable[..., Any], params: Named, *args: Any) -> Any:
    """`run`, with parameters that are gathered over `fsdp` where they are used.

    The partitioner moves what is only constrained to be whole away from its place; a collective that the program itself asks for stays.
    """
    kept = {name: mesh.spec_of(value.shape, name) for name, value in params.items()}
    used = {name: mesh.used_spec(value.shape, name) for name, value in params.items()}

    def gather(name: str, part: jax.Array, dropped: int) -> jax.Array:
        before, after = kept[name][dropped:], used[name][dropped:]
        axis = before.index("fsdp")
        gathered = jax.shard_map(
            lambda part: lax.all_gather(part, "fsdp", axis=axis, tiled=True),
            mesh=mesh.mesh,
            in_specs=as_partition(before),
            out_specs=as_partition((*before[:axis], None, *before[axis + 1 :])),
            check_vma=False,
        )(part)
        return lax.with_sharding_constraint(gathered, mesh.sharding_of(after))

    whole = {
        name: Whole(value.shape, value.dtype, kept[name].index("fsdp"))
        for name, value in params.items()
        if "fsdp" in kept[name]
    }
    params = {**params, **_used(mesh, {name: value for name, value in params.items() if name not in whole})}
    return run_with_late_gathers(run, params, whole, gather, *args)


def _constrained(mesh: DeviceMesh, layout: Layout, run: Callable[..., Any], *args: Any) -> Any:
    """`run`, with constraints on its products with weights that `tensor` cuts, and on what follows sequences."""
    params, num_leaves = args[0], len(jax.tree.leaves(args))
    sizes = [spec.shape[axis] for spec, axis in zip(layout.specs, layout.axes, strict=True) if axis is not None]
    if layout.labels is not None:
        known: list[Labels] = [()] * num_leaves
        first = len(jax.tree.leaves(args[:3]))
        known[first : first + len(layout.labels)] = layout.labels
        run = functools.partial(Sequences(mesh).run, run, known)
    if not mesh.cuts_layers:
        return run(*args)
    tags: list[Any] = [mesh.used_spec(value.shape, name) for name, value in sorted(params.items())]
    tags += [None] * (num_leaves - len(tags))
    return Constrainer(mesh, sizes[0] if sizes else None).run(run, tags, *args)


def _lay(mesh: DeviceMesh, value: jax.Array, axis: int | None) -> jax.Array:
    if axis is not None and value.shape[axis] % mesh.num_shards:
        axis = None
    return lax.with_sharding_constraint(value, NamedSharding(mesh.mesh, mesh.spec(axis)))


# -- a replica on every data shard -----------------------------------------------------------------------------------------


def _run_replicas(mesh: DeviceMesh, layout: Layout, program: Program, args: Arguments) -> ProgramResult:
    cut = {name: mesh.kept_axis(value.shape, name) for name, value in args.params.items()}
    whole = {
        name: Whole(value.shape, value.dtype, axis)
        for name, value in args.params.items()
        if (axis := cut[name]) is not None
    }

    def gather(name: str, part: jax.Array, dropped: int) -> jax.Array:
        return lax.all_gather(part, "fsdp", axis=whole[name].axis - dropped, tiled=True)

    def own(*args: Any) -> tuple[Any, ...]:
        loss, outputs, grads, buffers = _fields(program, *args)
        grads = {name: _averaged(value, mesh.kept_axis(value.shape, name), mesh) for name, value in grads.items()}
        return loss, outputs, grads, buffers

    def replica(args: Arguments) -> tuple[Any, ...]:
        index = lax.axis_index(DATA_AXES)
        args = args._replace(key=jax.random.fold_in(args.key, index))
        loss, outputs, grads, buffers = run_with_late_gathers(own, args.params, whole, gather, *args[1:])
        outputs = [
            _over_shards(value) if axis is None else value
            for value, axis in zip(outputs, program.output_axes, strict=True)
        ]
        return lax.pmean(loss, DATA_AXES), outputs, grads, _of_first_shard(buffers, index)

    everywhere = mesh.spec(None)
    specs = {name: mesh.kept_spec(value.shape, name) for name, value in args.params.items()}
    loss, outputs, grads, buffers = jax.shard_map(
        replica,
        mesh=mesh.mesh,
        in_specs=(
            Arguments._make([specs, everywhere, everywhere, [mesh.spec(axis) for axis in layout.axes], everywhere]),
        ),
        out_specs=(
            everywhere,
            [mesh.spec(axis) for axis in program.output_axes],
            {name: specs[name] for name in program.grad_names},
            everywhere,
        ),
        check_vma=False,  # replicas differentiate on their own; the averaging above is all there is between them
    )(args)
    return ProgramResult(loss, outputs, grads, buffers)


def _averaged(value: jax.Array, axis: int | None, mesh: DeviceMesh) -> jax.Array:
    """The mean of a gradient over all replicas: of its own part, where each device keeps one."""
    if axis is None:
        return lax.pmean(value, DATA_AXES)
    last = value.ndim - 1
    if mesh.platform == "tpu" and axis == last > 0 and value.shape[last] // mesh.sizes["fsdp"] % _TPU_LANES:
        # Parts that fill no tiles: with rows outermost the compiler would all-reduce the whole, as for a tied table of width 768.
        value = memory.with_layout_constraint(value, memory.Layout(major_to_minor=(last, *range(last))))
    part = lax.psum_scatter(value, "fsdp", scatter_dimension=axis, tiled=True) / mesh.num_parts
    return lax.pmean(part, ("replica", "data"))


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


# -- pieces of a global program that run on every data shard ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaCall:
    """The ShardCall of this mesh: a global program cuts its replica parts with it, and replicas sum over each other with it."""

    mesh: DeviceMesh
    num_replicas: int

    @property
    def num_sequence_parts(self) -> int:
        """Of the mesh."""
        return self.mesh.sizes["sequence"]

    def __call__(
        self,
        function: Callable[..., tuple[jax.Array, ...]],
        in_axes: Sequence[int | None],
        out_axes: Sequence[int | str | None],
    ) -> Callable[..., tuple[jax.Array, ...]]:
        """`function` on every data shard."""
        if self.num_replicas == 1:
            return lambda *arrays: function(jnp.int32(0), *arrays)

        def replica(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            index = lax.axis_index(DATA_AXES)
            return tuple(
                _joined(value, axis, index) for value, axis in zip(function(index, *arrays), out_axes, strict=True)
            )

        return jax.shard_map(
            replica,
            mesh=self.mesh.mesh,
            in_specs=tuple(self.mesh.spec(axis) for axis in in_axes),
            out_specs=tuple(self.mesh.spec(axis if isinstance(axis, int) else None) for axis in out_axes),
            check_vma=False,
        )

    def sum_over_shards(self, value: jax.Array) -> jax.Array:
        """The sum over the replicas; a program of the whole batch has one."""
        return value if self.num_replicas == 1 else lax.psum(value, DATA_AXES)


def _joined(value: jax.Array, axis: int | str | None, index: jax.Array) -> jax.Array:
    if axis == "mean":
        return lax.pmean(value, DATA_AXES)
    if axis == "sum":
        return lax.psum(value.astype(jnp.int32) if value.dtype == jnp.bool_ else value, DATA_AXES)
    return value if isinstance(axis, int) else _of_first_shard({"value": value}, index)["value"]
