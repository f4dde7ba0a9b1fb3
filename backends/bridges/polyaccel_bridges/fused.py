"""A recording on one data shard, captured whole: model calls, the user's operations and the backward as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from polyaccel.protocols import ArraySpec, ProgramResult

from . import scope as capturing
from .calls import ForwardProgram, TrainingProgram, numpy_dtypes, tensor_specs
from .capture import capture_forward, capture_training
from .exchange import torch_dtype
from .graphs import TensorSpec
from .packing import thaw
from .shadows import freeze_result

if TYPE_CHECKING:
    from .recordings import Entry
    from .tape_calls import TapeRecipe

DRAW_SHIFT = 20  # every operation has 2**20 random draws of its own, whatever else is captured with it


def number_draws(position: int) -> None:
    """During a capture: the random draws of the operation at `position` are the same ones in every program it is part of."""
    torch.default_generator.manual_seed(position << DRAW_SHIFT)


def run_entry(entry: Entry, leaf: Any, scope: capturing.CaptureScope, *, allow_grad: bool = True) -> list[torch.Tensor]:
    """Run one recorded operation inside a capture; its tensors in order."""
    number_draws(entry.position)
    with entry.modes.active(allow_grad=allow_grad):
        args, kwargs = thaw(entry.arguments, leaf)
        if entry.model is not None:
            assert entry.model.prepared is not None
            with entry.token.in_force():  # modes may have been switched since the call
                result = scope.call(entry.model.prepared, args, kwargs)
        else:
            result = entry.func(*args, **kwargs)
    return freeze_result(result)[1]


def started(
    params: dict[str, Any], buffers: dict[str, Any], at: dict[str, int], inputs: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers with those that are inputs (`at`: name -> index) in their places."""
    given = {name: inputs[index] for name, index in at.items()}
    own = {**params, **{name: value for name, value in given.items() if name in params}}
    return own, {**buffers, **{name: value for name, value in given.items() if name not in params}}


class _FusedProgram:
    """A captured program whose buffers, and parameters that it writes, may come from its inputs."""

    def __init__(self, inner: Any, num_inputs: int, buffer_inputs: dict[str, int], *, keeps_buffers: bool) -> None:
        self.grad_names = inner.grad_names
        self.output_axes = inner.output_axes
        self.draws_randomly = inner.draws_randomly
        self._inner = inner
        self._num_inputs = num_inputs
        self._buffer_inputs = buffer_inputs
        self._keeps_buffers = keeps_buffers
        self.writes_buffers: bool = inner.writes_buffers
        self.written_params: frozenset[str] = inner.written_params
        self.writes_params: bool = inner.writes_params
        self.input_grads: tuple[int, ...] = inner.input_grads

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        own, start = started(params, buffers, self._buffer_inputs, inputs)
        result: ProgramResult = self._inner(own, start, key, inputs[: self._num_inputs], loss_scale)
        if not self._keeps_buffers:
            result.buffers = {}
        return result


def fused_program(
    recipe: TapeRecipe, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
) -> Any:
    """The program of a recipe with one recording."""
    part = recipe.parts[0]
    is_scaled = with_grads and recipe.recorder.engine.plan.precision.loss_scaling is not None
    own = specs[: part.num_inputs]
    dtypes = input_dtypes(recipe, 0, own)
    modules = {model.handle.name: model.module for model in part.models}
    prepared = [model.prepared for model in part.models if model.prepared is not None]
    autocast = recipe.recorder.autocast_dtype

    def run(leaves: Sequence[torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
        env: dict[tuple[int, int], torch.Tensor] = {}
        scope = capturing.CaptureScope(prepared, autocast)

        def value(entry: Entry, found: tuple[Any, ...], numbers: dict[int, torch.Tensor]) -> Any:
            kind = found[1]
            if kind == "r":
                return env[found[2], found[3]]
            if kind == "i":
                return leaves[found[2]]
            if kind == "p":
                index, name = found[2]
                return part.models[index].slot(name)
            return numbers[found[2]] if entry.numbers is None else entry.numbers[found[2]]

        with scope.active():
            for entry in part.entries:
                numbers = {n: leaves[index] for n, index in enumerate(part.floats.get(entry.position, ()))}
                tensors = run_entry(
                    entry,
                    lambda found, entry=entry, numbers=numbers: value(entry, found, numbers),
                    scope,
                    allow_grad=with_grads,
                )
                for out, tensor in enumerate(tensors):
                    env[entry.position, out] = tensor
        return env

    axes = [wanted_axis(recipe, place) for place in recipe.wanted]
    needing = recipe.wanted_inputs(0)
    inputs = [
        replace(spec, requires_grad=with_grads and index in needing)
        for index, spec in enumerate(tensor_specs(own, dtypes))
    ]
    inner: Any
    if with_grads:
        assert recipe.loss is not None
        _, position, out = recipe.loss

        def step(*leaves: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            env = run(leaves)
            loss = env[position, out]
            aux = [loss, *(env[place[1], place[2]] for place in recipe.wanted)]
            return (loss * leaves[-1] if is_scaled else loss), aux

        scale = [TensorSpec((), torch.float32)] if is_scaled else []
        graph = capture_training(step, modules, [*inputs, *scale], autocast=None)
        inner = TrainingProgram(
            graph, numpy_dtypes(dtypes), axes, shard_call, is_scaled=is_scaled, input_axes=recipe.axes
        )
    else:

        def look(*leaves: torch.Tensor) -> list[torch.Tensor]:
            env = run(leaves)
            return [env[place[1], place[2]] for place in recipe.wanted]

        looked = capture_forward(look, modules, inputs, autocast=None)
        inner = ForwardProgram(looked, numpy_dtypes(dtypes), axes, shard_call)
    return _FusedProgram(inner, part.num_inputs, part.buffer_inputs, keeps_buffers=not part.is_executed)


def input_dtypes(recipe: TapeRecipe, part: int, specs: Sequence[ArraySpec]) -> list[torch.dtype]:
    """The dtypes that user code saw of a recording's inputs."""
    from .tape_calls import operands_of

    known: dict[int, torch.dtype] = {}
    for entry in recipe.parts[part].entries:
        for leaf in operands_of(entry):
            if leaf[1] == "i":
                known[leaf[2]] = leaf[3]
    return [known.get(index, torch_dtype(spec.dtype)) for index, spec in enumerate(specs)]


def wanted_axis(recipe: TapeRecipe, place: Any) -> int | None:
    """The batch dim of a recorded value on one shard: dim 0 where it has the batch's size."""
    spec = recipe.spec(place)
    batch_size = next((shape[0] for shape in _batch_shapes(recipe)), None)
    return 0 if spec.shape and spec.shape[0] == batch_size else None


def _batch_shapes(recipe: TapeRecipe) -> list[torch.Size]:
    from .tape_calls import operands_of

    return [
        leaf[4]
        for part in recipe.parts
        for entry in part.entries
        for leaf in operands_of(entry)
        if leaf[1] == "i" and leaf[6] == 0
    ]
