"""Forward passes without gradients: captured once per model state and input signature, computed at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from polyaccel.protocols import ArraySpec

from . import scope as capturing
from .attributes import NO_EFFECTS, learn
from .calls import ForwardProgram, TorchCall, batch_axes, batch_size_of, grown, numpy_dtypes, rebuild, tensor_specs
from .capture import capture_forward
from .descriptions import facts_of_arguments, facts_of_models, shown
from .functions import feed, lifted
from .modules import ManagedModel
from .packing import LEAF, Key, freeze, settle, thaw
from .shadows import Modes, OutSpec, freeze_result, infer

if TYPE_CHECKING:
    from .tape import Recorder


@final
class Forwards:
    """The forward programs of one recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recipes: dict[Key, _ForwardRecipe] = {}

    def call(
        self, model: ManagedModel, token: Any, modes: Modes, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The model's outputs as DeviceTensors, or their structure as the user's module makes it."""
        inputs: list[Any] = []
        axes: list[int | None] = []
        batch_size: list[int] = []

        def tensor(found: torch.Tensor) -> Key:
            value, axis = feed(found)
            if axis is not None:
                batch_size.append(found.shape[axis])
                axis = axis if found.shape[axis] == batch_size[0] else None
            inputs.append(value)
            axes.append(axis)
            return (LEAF, len(inputs) - 1, found.dtype, found.shape, axis)

        arguments = freeze((args, dict(kwargs)), tensor)
        modes = Modes(False, modes.autocast)
        key = (model, token, modes, arguments)
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = _ForwardRecipe(self._recorder, model, modes, settle(arguments), axes)
            self._recipes[settle(key)] = recipe
        model.push_writes()
        call = TorchCall(recipe, (model.handle,), inputs, axes, recipe.finish)
        result = self._recorder.engine.run_forward(call)
        recipe.effects.apply()
        return result


@final
class _ForwardRecipe:
    """One model in one state, called with arguments of one structure."""

    def __init__(
        self, recorder: Recorder, model: ManagedModel, modes: Modes, arguments: Key, axes: Sequence[int | None]
    ) -> None:
        from .packing import described

        self._recorder = recorder
        self._model = model
        self._modes = modes
        self._arguments = arguments
        self._axes = list(axes)
        self._dtypes = [found[2] for found in described(arguments)]
        self._structure: Key = None
        self._autocast = recorder.autocast_dtype
        self._output_axes: list[int | None] = []
        self._scope: Any = None
        self.effects = NO_EFFECTS  # what a call does to Python attributes

    def _run(self, leaves: Sequence[torch.Tensor]) -> Any:
        prepared = self._model.prepared
        assert prepared is not None
        args, kwargs = thaw(self._arguments, lambda found: leaves[found[1]])
        self._scope = scope = capturing.CaptureScope([prepared], self._autocast)
        with scope.active():
            return scope.call(prepared, args, kwargs)

    def build(
        self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
    ) -> ForwardProgram:
        """Capture the outputs at these shapes."""
        modules = {self._model.handle.name: self._model.module}
        seen: list[list[OutSpec]] = []

        def function(*leaves: torch.Tensor) -> list[torch.Tensor]:
            with self._modes.active():
                self._structure, tensors = freeze_result(self._run(leaves))
            seen.append([OutSpec(t.shape, t.dtype, False) for t in tensors])
            return tensors

        graph = capture_forward(function, modules, tensor_specs(specs, self._dtypes), autocast=None)
        batch_size = batch_size_of([spec.shape for spec in specs], self._axes)
        large = None
        local = [OutSpec(torch.Size(s.shape), d, False) for s, d in zip(specs, self._dtypes, strict=True)]

        def again() -> Any:
            infer(modules, self._run, local, self._modes)
            return self._scope

        self.effects = learn(self._scope, again)
        if num_shards > 1:
            _, large = infer(modules, self._run, grown(local, self._axes, 2), self._modes)
        self._output_axes = batch_axes(seen[-1], large, batch_size)
        return ForwardProgram(graph, numpy_dtypes(self._dtypes), self._output_axes, shard_call)

    def describe(self) -> tuple[str, dict[str, str]]:
        """The model's name, and what its program is specialised on."""
        facts = facts_of_arguments(self._model.module.forward, self._arguments, lambda found: shown(found[2], found[3]))
        return type(self._model.module).__name__, {**facts, **facts_of_models([self._model])}

    def finish(self, loss: Any, outputs: list[Any]) -> Any:
        """The model's own structure."""
        return rebuild(self._structure, lambda index: lifted(self._recorder, outputs[index], self._output_axes[index]))
