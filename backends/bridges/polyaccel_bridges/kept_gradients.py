"""Gradients as values: a program that gives them as outputs, and the call that adds them to the models' own later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from polyaccel.protocols import ArraySpec, ProgramResult

if TYPE_CHECKING:
    from .tape_calls import TapeRecipe


@final
class _GradientsProgram:
    """A captured step whose loss and gradients are its last outputs."""

    grad_names: tuple[str, ...] = ()

    def __init__(self, inner: Any) -> None:
        self.names: tuple[str, ...] = tuple(inner.grad_names)
        self.output_axes: tuple[int | None, ...] = (*inner.output_axes, None, *[None] * len(self.names))
        self.draws_randomly: bool = inner.draws_randomly
        self.writes_params: bool = inner.writes_params
        self._inner = inner

    @property
    def averages_shards(self) -> bool:
        """As of a ComposedProgram."""
        return bool(getattr(self._inner, "averages_shards", False))

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        result: ProgramResult = self._inner(params, buffers, key, inputs, None)
        gradients = [result.grads[name] for name in self.names]
        return ProgramResult(None, [*result.outputs, result.loss, *gradients], {}, result.buffers)


@final
class GradientsRecipe:
    """The wanted values of a recording, then its loss, then the loss's gradients by `names`: all of them outputs, nothing is added."""

    def __init__(self, tape: TapeRecipe) -> None:
        self.tape = tape
        self.names: tuple[str, ...] = ()
        self.program: Any = None  # the latest
        self.constants = tape.constants
        self.adding = AddingRecipe(self)

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any) -> Any:
        """Capture the step with its backward."""
        program = _GradientsProgram(
            self.tape.build(specs, with_grads=True, num_shards=num_shards, shard_call=shard_call)
        )
        self.names, self.program = program.names, program
        return program

    def describe(self) -> tuple[str, dict[str, str]]:
        """The recorded loop."""
        name, facts = self.tape.describe()
        return f"{name}, with gradients", facts

    def split(self, outputs: Sequence[Any]) -> tuple[list[Any], Any, dict[str, Any]]:
        """What a run gave: (wanted values, loss, gradients by name)."""
        count = len(outputs) - 1 - len(self.names)
        return list(outputs[:count]), outputs[count], dict(zip(self.names, outputs[count + 1 :], strict=True))


@final
class _AddingProgram:
    output_axes: tuple[int | None, ...] = ()
    draws_randomly = False
    writes_params = False

    def __init__(self, names: tuple[str, ...], averages_shards: bool) -> None:
        self.grad_names = names
        self.averages_shards = averages_shards

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        loss, *gradients = inputs
        return ProgramResult(loss, [], dict(zip(self.grad_names, gradients, strict=True)), {})


@final
class AddingRecipe:
    """A "step" whose inputs are a loss and its gradients: the engine scales them and adds them to those that the models hold."""

    def __init__(self, source: GradientsRecipe) -> None:
        self._source = source

    def build(
        self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
    ) -> _AddingProgram:
        """Nothing is captured."""
        return _AddingProgram(self._source.names, self._source.program.averages_shards)

    def describe(self) -> tuple[str, dict[str, str]]:
        """The recorded loop."""
        name, facts = self._source.tape.describe()
        return f"the kept gradients of {name}", facts
