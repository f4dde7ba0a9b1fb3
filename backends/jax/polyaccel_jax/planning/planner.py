"""Compiles the programs of a script's first step for devices that are not here, runs none of them, and notes what the compiler says."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, final

import jax
import numpy as np
from jax.sharding import Sharding

from polyaccel.planned.report import ProgramPlan, StepPlan
from polyaccel_jax.flops import UncountableError, flops_of
from polyaccel_jax.planning.arrays import PlannedArray, part_bytes, tell_reads
from polyaccel_jax.planning.hlo import collectives_of

if TYPE_CHECKING:
    from polyaccel.planned.topologies import TopologyName
    from polyaccel_jax.engine import JaxEngine
    from polyaccel_jax.handles import JaxModel, JaxOptimizer

_READ = (
    "the script reads a value before its first update and was given zeros: where it branches on one, this may be another step than that"
    " of a run"
)
# What XLA says where a program needs more than the device has: RESOURCE_EXHAUSTED is its status, CompileTimeHbmOom the TPU compiler's.
_TOO_LARGE = ("RESOURCE_EXHAUSTED", "HbmOom", "exceeds available", "Ran out of memory")


class StepIsPlanned(BaseException):
    """The first step is compiled: the script ends here. No Exception, so that no script's own handler takes it."""


@final
class Planner:
    """What an engine that plans asks instead of its devices. One for one run of a script, `close` at its end."""

    array_type: type = PlannedArray

    def __init__(self, topology: TopologyName) -> None:
        self.topology = topology
        self.engine: JaxEngine | None = None
        self.models: list[JaxModel] = []
        self.optimizers: list[JaxOptimizer] = []
        self.refusal: str | None = None
        self.is_complete = False  # whether a whole step was seen
        self._programs: dict[Hashable, _Compiled] = {}
        self._updated: set[int] = set()
        self._remarks: dict[str, None] = {}
        tell_reads(lambda: self._remarks.update({_READ: None}))

    def close(self) -> None:
        """Listen to no more reads."""
        tell_reads(None)

    # -- what the engine asks ----------------------------------------------------------------------------------------------

    def array(self, value: Any, place: Callable[..., Sharding], name: str | None = None) -> Any:
        """The shape that stands for an array (or a number, an ArraySpec) that would lie on the devices as `place(it, name)` says."""
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            value = np.asarray(value)
        dtype = jax.dtypes.canonicalize_dtype(value.dtype, allow_extended_dtype=True)
        shape = jax.ShapeDtypeStruct(tuple(value.shape), dtype)
        return PlannedArray(shape.shape, shape.dtype, sharding=place(shape, name))

    def laid(self, value: Any, sharding: Sharding) -> Any:
        """The same for one place."""
        return self.array(value, lambda *_: sharding)

    def planned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the engine calls instead of a jitted function: it compiles, and gives the shapes of the results."""
        return lambda *args: self._compile(function, args)

    def updated(self, optimizer: JaxOptimizer) -> None:
        """Note an update. Raises StepIsPlanned once every optimizer has had one, or this one its second."""
        is_again = id(optimizer) in self._updated
        self._updated.add(id(optimizer))
        if is_again or len(self._updated) >= len(self.optimizers):
            self.is_complete = True
            raise StepIsPlanned

    # -- the programs ------------------------------------------------------------------------------------------------------

    def _compile(self, function: Any, args: tuple[Any, ...]) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (id(function), structure, tuple([_signature(leaf) for leaf in leaves]))
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = self._made(function, args, leaves)
        found.runs += 1
        return found.results

    def _made(self, function: Any, args: tuple[Any, ...], leaves: list[Any]) -> _Compiled:
        traced = function.trace(*args)
        start = time.perf_counter()
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if not any(words in text for words in _TOO_LARGE):
                raise
            self.refusal = text
            raise StepIsPlanned from error
        seconds = time.perf_counter() - start
        results = jax.tree.map(
            lambda value, sharding: PlannedArray(value.shape, value.dtype, sharding=sharding),
            traced.out_info,
            compiled.output_shardings,
        )
        plan = _plan_of(self._name(function), compiled, self._resident_beside(leaves), seconds)
        return _Compiled(plan, _matrix_flops(traced, self.topology.num_devices), results, function)

    def _name(self, function: Any) -> str:
        pending = None if self.engine is None else self.engine.compiles.pending
        return pending or str(getattr(function, "__name__", "program"))

    def _resident_beside(self, leaves: list[Any]) -> int:
        """Bytes of one device's parameters, buffers, gradients and optimizer states that are no arguments."""
        arguments = {id(leaf) for leaf in leaves}
        held = {id(array): array for array in self._held() if id(array) not in arguments}
        return sum(map(part_bytes, held.values()))

    def _held(self) -> list[Any]:
        found: list[Any] = []
        for model in self.models:
            found += [*model.leaves, *model.buffer_arrays.values(), *model.gradients.values()]
        for optimizer in self.optimizers:
            found += optimizer.leaves
        return [array for array in found if isinstance(array, PlannedArray)]

    # -- the result --------------------------------------------------------------------------------------------------------

    def step_plan(self, mesh: Mapping[str, int]) -> StepPlan:
        """Everything that was seen. Programs in the order of their first use."""
        params = [leaf for model in self.models for leaf in model.leaves]
        buffers = [array for model in self.models for array in model.buffer_arrays.values()]
        states = [leaf for optimizer in self.optimizers for leaf in optimizer.leaves]
        return StepPlan(
            topology=self.topology.text,
            num_devices=self.topology.num_devices,
            mesh=dict(mesh),
            num_parameters=sum(int(leaf.size) for leaf in params),
            parameter_bytes=sum(map(part_bytes, params)),
            buffer_bytes=sum(map(part_bytes, buffers)),
            optimizer_bytes=sum(map(part_bytes, states)),
            programs=tuple(program.plan() for program in self._programs.values()),
            refusal=self.refusal,
            remarks=tuple(self._remarks),
        )


@final
class _Compiled:
    """One program: its numbers, and the shapes of its results, which its every run gives."""

    def __init__(self, plan: dict[str, Any], matrix_flops: float | None, results: Any, function: Any) -> None:
        self.results = results
        self.runs = 0
        self._plan = plan
        self._matrix_flops = matrix_flops
        self._function = function  # its id is in a key, so it must live as long

    def plan(self) -> ProgramPlan:
        """The numbers, with how often it ran."""
        return ProgramPlan(**self._plan, matrix_flops=self._matrix_flops, runs=self.runs)


def _signature(leaf: Any) -> Hashable:
    return (tuple(leaf.shape), str(leaf.dtype), getattr(leaf, "sharding", None)) if hasattr(leaf, "dtype") else leaf


def _plan_of(name: str, compiled: Any, resident_bytes: int, compile_s: float) -> dict[str, Any]:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    said = cost.get("optimal_seconds")
    return {
        "name": name,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "code_bytes": int(memory.generated_code_size_in_bytes),
        "resident_bytes": resident_bytes,
        "flops": float(cost.get("flops", 0.0)),
        "accessed_bytes": float(cost.get("bytes accessed", 0.0)),
        "compiler_s": None if said is None else float(said),
        "compile_s": compile_s,
        "collectives": collectives_of(compiled.as_text()),
    }


def _matrix_flops(traced: Any, num_devices: int) -> float | None:
    """Of one device; the jaxpr of a replica program counts all shards, as that of a global one does."""
    try:
        return flops_of(traced.jaxpr) / num_devices
    except UncountableError:
        return None
