"""Recordings over several data shards, or several recordings at once: separately captured pieces, composed inside one program.

Every model call runs per data shard (its BatchNorm sees the shard's samples, its dropout draws the shard's numbers); the user's
operations run on the whole values of each process, as user code saw them. The backward pass walks the pieces in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import torch

from polyaccel.errors import PlanError, PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec, ProgramResult

from . import scope as capturing
from .calls import as_dtypes, numpy_dtypes
from .capture import capture_vjp
from .fused import input_dtypes, run_entry, started
from .graphs import TensorSpec, written_params
from .own_values import OWN, taken
from .piece_runs import PieceGraph, ShardedPiece, WholePiece
from .shadows import OutSpec
from .tape_calls import operands_of, wants_gradient
from .tensors import STACKED

if TYPE_CHECKING:
    from .recordings import Entry
    from .tape_calls import Place, TapeRecipe

Operand = tuple[Any, ...]  # ("v", place), ("i", part, index): what a piece takes


@dataclass(slots=True)
class _Group:
    """Operations that are captured together: one model call, or a run of user operations of one recording."""

    part: int
    entries: list[Entry]
    operands: list[Operand] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    gives: list[Place] = field(default_factory=list)
    params: list[tuple[int, str]] = field(default_factory=list)
    writes: bool = False

    @property
    def is_model(self) -> bool:
        return self.entries[0].model is not None


def composed_program(
    recipe: TapeRecipe, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
) -> ComposedProgram:
    """The program of a recipe, for the shapes of the whole batch."""
    dtypes: list[torch.dtype] = []
    for index, part in enumerate(recipe.parts):
        dtypes.extend(input_dtypes(recipe, index, specs[part.first_input : part.first_input + part.num_inputs]))
    groups = _grouped(recipe)
    return ComposedProgram(recipe, groups, num_shards, shard_call, with_grads=with_grads)


def _grouped(recipe: TapeRecipe) -> list[_Group]:
    groups: list[_Group] = []
    known: dict[Place, OutSpec] = {}
    for index, part in enumerate(recipe.parts):
        for entry in part.entries:
            last = groups[-1] if groups else None
            if last is None or entry.model is not None or last.is_model or last.part != index:
                groups.append(_Group(index, []))
            groups[-1].entries.append(entry)
            _note_operands(recipe, groups[-1], entry, part.floats.get(entry.position, []), known)
            known.update({(index, entry.position, out): spec for out, spec in enumerate(entry.specs)})
            leaves = operands_of(entry)
            for operand, spec in entry.updates:
                if leaves[operand][1] == "r":
                    known[index, leaves[operand][2], leaves[operand][3]] = spec
    _note_results(recipe, groups)
    return [group for group in groups if group.gives or group.is_model]


def _note_operands(
    recipe: TapeRecipe, group: _Group, entry: Entry, floats: list[int], known: dict[Place, OutSpec]
) -> None:
    part = recipe.parts[group.part]
    inside = {one.position for one in group.entries}
    for found in operands_of(entry):
        kind = found[1]
        if kind == "p":
            if found[2] not in group.params:
                group.params.append(found[2])
            continue
        if kind == "r" and found[2] in inside:
            continue
        if kind == "i":
            operand: Operand = ("i", group.part, found[2])
            spec = OutSpec(found[4], found[3], wants_gradient(found))
        else:
            place = part.externals[found[2]] if kind == "x" else (group.part, found[2], found[3])
            operand = ("v", place)
            spec = known[place]
        if operand not in group.operands:
            group.operands.append(operand)
            group.specs.append(TensorSpec(tuple(spec.shape), spec.dtype, spec.requires_grad))
    for index in floats:
        group.operands.append(("i", group.part, index))
        assert entry.changing is not None
        group.specs.append(TensorSpec((), entry.changing.dtype))
    group.writes = group.writes or bool(entry.writes)


def _note_results(recipe: TapeRecipe, groups: list[_Group]) -> None:
    """What each group gives: whatever it makes, or may write to, that is needed behind it."""
    needed: set[Place] = set(recipe.wanted)
    if recipe.loss is not None:
        needed.add(recipe.loss)
    for group in reversed(groups):
        made = {
            (group.part, entry.position, out)
            for entry in group.entries
            for out in range(len(entry.specs))
            if out not in entry.same
        }
        taken = {operand[1] for operand in group.operands if operand[0] == "v"}
        gives = needed & (made | taken if group.writes else made)
        group.gives = sorted(gives)
        if group.writes:
            _refuse_hidden_writes(recipe, group, needed)
        needed = (needed - made) | taken


def _refuse_hidden_writes(recipe: TapeRecipe, group: _Group, needed: set[Place]) -> None:
    """A write to a view whose base lies in another piece would be lost."""
    taken = [operand[1] for operand in group.operands if operand[0] == "v"]
    views = [place for place in taken if _is_view(recipe, place)]
    others = [place for place in needed if place not in taken and place[:2] < (group.part, group.entries[0].position)]
    if views and others:
        entry = recipe.parts[views[0][0]].at(views[0][1])
        raise PrepareError(
            f"a view of a model's output (made by {getattr(entry.func, '__name__', entry.func)}) is written to after another"
            " model was called",
            "write before the other call, or use the operation that returns a new tensor",
        )


def _is_view(recipe: TapeRecipe, place: Place) -> bool:
    entry = recipe.parts[place[0]].at(place[1])
    return entry.model is None and entry.gives_view


@final
class _Captured:
    """A group with its graph, and how its values lie."""

    def __init__(
        self, recipe: TapeRecipe, group: _Group, num_shards: int, shard_call: Any, *, with_grads: bool
    ) -> None:
        self.group = group
        self.recipe = recipe
        self.num_processes = recipe.recorder.num_processes
        self.num_shards = num_shards
        specs = group.specs if with_grads else [TensorSpec(s.shape, s.dtype, False) for s in group.specs]
        self.in_axes: list[int | None] = [None] * len(specs)
        self.batch_size: int | None = None  # of one process
        if group.is_model:
            self.batch_size = next((spec.shape[0] for spec in specs if spec.shape), None)
            specs = self._cut(specs)
        self.piece = PieceGraph(capture_vjp(self._function(with_grads), self._modules(), specs, autocast=None))
        if not group.is_model:
            self.run = WholePiece(self.piece, self.num_processes)
        else:
            self.out_axes = self._out_axes()
            self.sharded = ShardedPiece(self.piece, self.in_axes, self.out_axes, num_shards, shard_call)

    def _modules(self) -> dict[str, torch.nn.Module]:
        part, group = self.recipe.parts[self.group.part], self.group
        if group.is_model:
            model = group.entries[0].model
            assert model is not None
            return {model.handle.name: model.module}
        used = [part.models[index] for index, _ in group.params]
        return {model.handle.name: model.module for model in dict.fromkeys(used)}

    def _cut(self, specs: list[TensorSpec]) -> list[TensorSpec]:
        """The specs that one replica sees; fills in_axes. The batch is dim 0 of the first input that has it."""
        cut: list[TensorSpec] = []
        for index, spec in enumerate(specs):
            if self.num_shards * self.num_processes == 1 or not spec.shape or spec.shape[0] != self.batch_size:
                cut.append(spec)
                continue
            size = spec.shape[0] * self.num_processes
            if size % self.num_shards:
                raise PlanError(
                    f"a batch of {size} samples cannot be cut over {self.num_shards} data shards in equal parts",
                    "use drop_last=True or even_batches=True in the loader, or a batch_size that divides by the data shards",
                )
            self.in_axes[index] = 0
            cut.append(TensorSpec((size // self.num_shards, *spec.shape[1:]), spec.dtype, spec.requires_grad))
        return cut

    def _out_axes(self) -> list[int | None]:
        entry = self.group.entries[0]
        axes: list[int | None] = []
        for place, local in zip(self.group.gives, self.piece.graph.output_specs, strict=True):
            whole = entry.specs[place[2]].shape
            if self.num_shards * self.num_processes == 1:
                axes.append(None)
            elif self.num_shards == self.num_processes:  # one shard per process: sizes do not tell
                axes.append(0 if whole and whole[0] == self.batch_size else None)
            else:
                axes.append(
                    next((dim for dim, (a, b) in enumerate(zip(whole, local.shape, strict=True)) if a != b), None)
                )
        return axes

    def _function(self, with_grads: bool) -> Any:
        group, recipe = self.group, self.recipe
        part = recipe.parts[group.part]
        prepared = [model.prepared for model in recipe.models if model.prepared is not None]
        place_of = {operand: index for index, operand in enumerate(group.operands)}

        def function(*leaves: torch.Tensor) -> list[torch.Tensor]:
            # What is written to must be no leaf of autograd.
            given = [leaf.clone() if group.writes and leaf.requires_grad else leaf for leaf in leaves]
            env: dict[Place, torch.Tensor] = {
                operand[1]: value for operand, value in zip(group.operands, given, strict=True) if operand[0] == "v"
            }

            def value(entry: Entry, found: tuple[Any, ...]) -> Any:
                kind = found[1]
                if kind == "r":
                    return env[group.part, found[2], found[3]]
                if kind == "x":
                    return env[part.externals[found[2]]]
                if kind == "i":
                    return given[place_of["i", group.part, found[2]]]
                if kind == "p":
                    index, name = found[2]
                    return part.models[index].slot(name)
                if entry.numbers is not None:
                    return entry.numbers[found[2]]
                return given[place_of["i", group.part, part.floats[entry.position][found[2]]]]

            scope = capturing.CaptureScope(prepared, recipe.recorder.autocast_dtype)
            with scope.active():
                for entry in group.entries:
                    tensors = run_entry(entry, lambda f, e=entry: value(e, f), scope, allow_grad=with_grads)
                    for out, tensor in enumerate(tensors):
                        if out not in entry.same:
                            env[group.part, entry.position, out] = tensor
            return [env[place] for place in group.gives]

        return function


@final
class ComposedProgram:
    """Runs the pieces forward, and backward from the loss; traceable by jax.jit."""

    def __init__(
        self, recipe: TapeRecipe, groups: list[_Group], num_shards: int, shard_call: Any, *, with_grads: bool
    ) -> None:
        self._recipe = recipe
        self._with_grads = with_grads
        self._num_processes = recipe.recorder.num_processes
        self._num_shards = num_shards
        self.averages_shards = False  # known once traced: the loss takes a mean over data shards of what a model gave
        self._captured = [_Captured(recipe, group, num_shards, shard_call, with_grads=with_grads) for group in groups]
        self._dtypes: dict[tuple[int, int], Any] = {}
        for captured in self._captured:
            group = captured.group
            for operand, dtype in zip(group.operands, numpy_dtypes([s.dtype for s in group.specs]), strict=True):
                if operand[0] == "i":
                    self._dtypes[operand[1:]] = dtype
        names = [name for captured in self._captured for name in captured.piece.graph.grad_names]
        self.grad_names: tuple[str, ...] = tuple(dict.fromkeys(names)) if with_grads else ()
        self.draws_randomly = any(captured.piece.draws_randomly for captured in self._captured)
        self.writes_buffers = any(captured.piece.graph.buffer_names for captured in self._captured)
        self.written_params = frozenset[str]().union(*(written_params(one.piece.graph) for one in self._captured))
        self.writes_params = bool(self.written_params)
        self._batch = {(captured.batch_size,) for captured in self._captured if captured.batch_size is not None}
        self._wanted_inputs: dict[Operand, TensorSpec] = {}
        if with_grads:
            for captured in self._captured:
                pairs = zip(captured.group.operands, captured.group.specs, strict=True)
                self._wanted_inputs.update({o: spec for o, spec in pairs if o[0] == "i" and spec.requires_grad})
        self.input_grads: tuple[int, ...] = tuple(
            recipe.parts[part].first_input + index for _, part, index in self._wanted_inputs
        )
        self.output_axes: tuple[int | None, ...] = (
            *(self._axis(place) for place in recipe.wanted),
            *(recipe.axes[index] for index in self.input_grads),
        )

    def _axis(self, place: Place) -> int | None:
        shape = self._recipe.spec(place).shape
        return 0 if tuple(shape[:1]) in self._batch else None

    # -- values of one process, values of all ------------------------------------------------------------------------------

    def _whole(
        self, operand: Operand, spec: TensorSpec, inputs: Sequence[Any], env: dict[Place, Any]
    ) -> tuple[Any, bool]:
        """A value as user code's pieces take it, and whether it has a dim for the processes."""
        if operand[0] == "v":
            return env[operand[1]], self._num_processes > 1
        part = self._recipe.parts[operand[1]]
        index = part.first_input + operand[2]
        (value,) = as_dtypes([inputs[index]], [self._dtypes[operand[1:]]])
        axis = self._recipe.axes[index]
        if self._num_processes == 1 or axis is None:
            return value, False
        if axis == STACKED:
            return value, True
        if axis == OWN:
            return taken(value, self._num_processes, tuple(spec.shape)), True
        return self._split(value, axis), True

    def _split(self, value: Any, axis: int) -> Any:
        shape = value.shape
        cut = value.reshape(*shape[:axis], self._num_processes, shape[axis] // self._num_processes, *shape[axis + 1 :])
        return jnp.moveaxis(cut, axis, 0)

    def _join(self, value: Any, axis: int) -> Any:
        moved = jnp.moveaxis(value, 0, axis)
        return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

    def _to_shards(self, value: Any, stacked: bool, axis: int | None) -> Any:
        if not stacked:
            return value
        if axis is None:
            raise UnsupportedError(
                f"a computed value of shape {tuple(value.shape[1:])} without a batch dim goes into a model in a job of several"
                " processes, which may each have another one",
                "give it the batch as its first dim, or compute it inside the model",
            )
        return self._join(value, axis)

    def _from_shards(self, value: Any, axis: int | None) -> Any:
        """A model's output as the user's pieces see it: joined batches, and the mean (integers: the sum) of single values."""
        if axis is not None:
            return value if self._num_processes == 1 else self._split(value, axis)
        if self._num_shards == 1:
            return value[0] if self._num_processes == 1 else jnp.repeat(value, self._num_processes, axis=0)
        local = value.reshape(self._num_processes, -1, *value.shape[1:])
        if jnp.issubdtype(value.dtype, jnp.inexact):
            merged = local.mean(1)
        else:
            merged = local.sum(1, dtype=value.dtype) if value.ndim == 1 and value.dtype != jnp.bool_ else local[:, 0]
        return merged[0] if self._num_processes == 1 else merged

    def _cotangent_to_shards(self, value: Any, axis: int | None) -> Any:
        if axis is not None:
            return value if self._num_processes == 1 else self._join(value, axis)
        stacked = value[None] if self._num_processes == 1 else value
        if self._num_shards == 1:
            return stacked.sum(0, keepdims=True)
        per_process = self._num_shards // self._num_processes
        spread = jnp.broadcast_to(stacked[:, None] / per_process, (stacked.shape[0], per_process, *stacked.shape[1:]))
        return spread.reshape(self._num_shards, *stacked.shape[1:]).astype(value.dtype)

    # -- the program -----------------------------------------------------------------------------------------------------------

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        """Traceable; `grads` are of loss_scale * loss."""
        recipe = self._recipe
        keys = [self._key(part.draw_input, key, inputs) for part in recipe.parts]
        start = [started(params, buffers, part.buffer_inputs, inputs) for part in recipe.parts]
        own, held = [params for params, _ in start], [buffers for _, buffers in start]
        env: dict[Place, Any] = {}
        versions: dict[Place, int] = {}
        changed: dict[str, Any] = {}
        saved: list[tuple[Any, list[bool], list[Any], list[Any]]] = []
        count = 0
        for captured in self._captured:
            group = captured.group
            given = [
                self._whole(operand, spec, inputs, env)
                for operand, spec in zip(group.operands, group.specs, strict=True)
            ]
            ids = [versions[operand[1]] if operand[0] == "v" else operand for operand in group.operands]
            values, stacked = [value for value, _ in given], [flag for _, flag in given]
            if group.is_model:
                shards = [
                    self._to_shards(value, flag, axis)
                    for value, flag, axis in zip(values, stacked, captured.in_axes, strict=True)
                ]
                outputs, written, kept = captured.sharded.forward(
                    own[group.part], held[group.part], shards, keys[group.part]
                )
                held[group.part].update({name: value for name, value in written.items() if name not in params})
                own[group.part] = {**own[group.part], **{n: v for n, v in written.items() if n in params}}
                if not recipe.parts[group.part].is_executed:
                    changed.update(written)
                outputs = [self._from_shards(v, a) for v, a in zip(outputs, captured.out_axes, strict=True)]
            else:
                outputs, kept = captured.run.forward(own[group.part], values, stacked, keys[group.part])
            made = []
            for place, output in zip(group.gives, outputs, strict=True):
                env[place], versions[place] = output, count
                made.append(count)
                count += 1
            saved.append((kept, stacked, ids, made))
        loss = None
        grads: dict[str, Any] = {}
        by_input: list[Any] = []
        if self._with_grads:
            assert recipe.loss is not None
            loss = env[recipe.loss]
            grads, by_input = self._backward(saved, versions[recipe.loss], loss, loss_scale, params)
            loss = loss.mean().reshape(())
        outputs = [self._shown(env[place], axis) for place, axis in zip(recipe.wanted, self.output_axes, strict=False)]
        return ProgramResult(loss, [*outputs, *by_input], grads, changed)

    def _shown(self, value: Any, axis: int | None) -> Any:
        if self._num_processes == 1:
            return value
        return value if axis is None else self._join(value, axis)

    def _key(self, draw_input: int | None, key: Any, inputs: Sequence[Any]) -> Any:
        if draw_input is None:
            return key
        return jax.random.wrap_key_data(inputs[draw_input], impl=jax.random.key_impl(key))

    def _backward(
        self, saved: list[Any], loss_id: int, loss: Any, loss_scale: Any, params: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Any]]:
        """Gradients by parameter name, and of the inputs that want one. `loss_scale` may be one for each process."""
        seed = jnp.full(loss.shape, 1 / self._num_processes, loss.dtype)
        if loss_scale is not None:
            by_process = loss_scale.reshape(-1, *[1] * (loss.ndim - 1)) if loss_scale.ndim else loss_scale
            seed = seed * by_process.astype(loss.dtype)
        cotangents: dict[Any, Any] = {loss_id: seed}
        grads: dict[str, Any] = {}
        for captured, (kept, stacked, ids, made) in zip(reversed(self._captured), reversed(saved), strict=True):
            graph = captured.piece.graph
            given = [cotangents.pop(i, None) if d else None for i, d in zip(made, graph.differentiable, strict=True)]
            if all(value is None for value in given):
                continue
            if captured.group.is_model:
                if self._num_shards > self._num_processes:
                    means = [v is not None and a is None for v, a in zip(given, captured.out_axes, strict=True)]
                    self.averages_shards = self.averages_shards or any(means)
                seeds = [
                    None if value is None else self._cotangent_to_shards(value, axis)
                    for value, axis in zip(given, captured.out_axes, strict=True)
                ]
                own, back = captured.sharded.backward(kept, seeds)
                back = [
                    self._back_from_shards(value, axis, flag)
                    for value, axis, flag in zip(back, captured.in_axes, stacked, strict=True)
                ]
            else:
                own, back = captured.run.backward(kept, stacked, given)
            for name, value in own.items():
                grads[name] = grads[name] + value if name in grads else value
            for i, value in zip(ids, back, strict=True):
                if value is not None:
                    cotangents[i] = cotangents[i] + value if i in cotangents else value
        by_input = []
        for operand, spec in self._wanted_inputs.items():
            value = cotangents.get(operand)
            value = jnp.zeros(spec.shape, self._dtypes[operand[1:]]) if value is None else value
            by_input.append(value if loss_scale is None else value / loss_scale.astype(value.dtype))
        named = {name: grads[name] if name in grads else jnp.zeros_like(params[name]) for name in self.grad_names}
        return named, by_input

    def _back_from_shards(self, value: Any, axis: int | None, stacked: bool) -> Any:
        if value is None or not stacked:
            return value
        return value if axis is None else self._split(value, axis)
