"""Work for the engine in the form it runs: a TorchCall carries inputs and a recipe; the recipe captures a program when one is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, final

import jax
import jax.numpy as jnp
import torch
from jax import lax

from polyaccel.protocols import ArraySpec, ProgramResult

from .graphs import ForwardGraph, TensorSpec, TrainingGraph, written_params
from .packing import Key, thaw
from .programs import numpy_dtype
from .replay import run_forward, run_training
from .shadows import OutSpec
from .shards import shared_by

if TYPE_CHECKING:
    from .modules import ManagedModel

Outputs = Callable[[Any, list[Any]], Any]


class Recipe(Protocol):
    """How the programs of all calls with one signature are made. Compared by identity."""

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any) -> Any: ...

    def describe(self) -> tuple[str, dict[str, str]]: ...


@final
class TorchCall:
    """A ProgramCall of the torch dialect."""

    __slots__ = ("_finish", "draw", "input_axes", "inputs", "is_global", "models", "signature")
    wants_64bit = True

    def __init__(
        self,
        recipe: Recipe,
        models: tuple[Any, ...],
        inputs: Sequence[Any],
        input_axes: Sequence[int | None],
        finish: Outputs,
        *,
        is_global: bool = False,
        draw: int | None = None,
    ) -> None:
        self.signature: Any = recipe
        self.models = models
        self.inputs = inputs
        self.input_axes = input_axes
        self.is_global = is_global
        self.draw = draw
        self._finish = finish

    @property
    def constants(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """See ProgramCall: those of a recorded loss."""
        found: tuple[tuple[str, ...], tuple[str, ...]] | None = getattr(self.signature, "constants", None)
        return found

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any) -> Any:
        """The program for inputs of these specs."""
        return self.signature.build(specs, with_grads=with_grads, num_shards=num_shards, shard_call=shard_call)

    def describe(self, inputs: Sequence[Any]) -> tuple[str, dict[str, str]]:
        """The user's name for what is called, and what its program is specialised on."""
        name, facts = self.signature.describe()
        return str(name), dict(facts)

    def auxiliary(self, name: str, outputs: list[Any]) -> Any:
        """Traced: the auxiliary value of this name of a loss function."""
        return self.signature.auxiliary(name, outputs)

    def finish(self, loss: Any, outputs: list[Any]) -> Any:
        """What user code gets."""
        return self._finish(loss, outputs)


@final
class TrainingProgram:
    """A captured step: loss, auxiliary values, gradients, written buffers.

    The gradients of inputs follow the auxiliary values among the outputs, times `input_scale` where the input carries the
    batch; `input_axes` are the batch dims of all inputs.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        dtypes: Sequence[Any],
        output_axes: Sequence[int | None],
        shard_call: Any,
        *,
        is_scaled: bool,
        input_axes: Sequence[int | None] = (),
        input_scale: float = 1.0,
    ) -> None:
        self.grad_names = graph.grad_names
        self.input_grads = graph.input_grads
        self.output_axes = (*output_axes, *(input_axes[index] for index in graph.input_grads))
        self._input_scale = input_scale
        self.draws_randomly = graph.program.draws_randomly
        self.writes_buffers = bool(graph.buffer_names)
        self.written_params = written_params(graph)
        self.writes_params = bool(self.written_params)
        self._graph = graph
        self._dtypes = tuple(dtypes)
        self._shard_call = shard_call
        self._is_scaled = is_scaled

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        """Traceable; `grads` are of loss_scale * loss."""
        values = as_dtypes(inputs, self._dtypes)
        if self._is_scaled:
            values.append(jnp.ones((), jnp.float32) if loss_scale is None else loss_scale.astype(jnp.float32))
        with shared_by(self._shard_call):
            result = run_training(self._graph, params, buffers, values, key)
        loss, *outputs = result.aux
        for gradient, axis in zip(result.input_grads, self.output_axes[len(outputs) :], strict=True):
            factor = 1.0 if axis is None else self._input_scale
            scale = factor if loss_scale is None else factor / loss_scale
            outputs.append(gradient * jnp.asarray(scale).astype(gradient.dtype))
        return ProgramResult(loss.reshape(()), outputs, result.grads, result.new_buffers)


@final
class ForwardProgram:
    """A captured function without gradients."""

    grad_names: tuple[str, ...] = ()
    input_grads: tuple[int, ...] = ()

    def __init__(
        self, graph: ForwardGraph, dtypes: Sequence[Any], output_axes: Sequence[int | None], shard_call: Any
    ) -> None:
        self.output_axes = tuple(output_axes)
        self.draws_randomly = graph.program.draws_randomly
        self.writes_buffers = bool(graph.buffer_names)
        self.written_params = written_params(graph)
        self.writes_params = bool(self.written_params)
        self._graph = graph
        self._dtypes = tuple(dtypes)
        self._shard_call = shard_call

    def __call__(
        self, params: dict[str, Any], buffers: dict[str, Any], key: Any, inputs: Sequence[Any], loss_scale: Any
    ) -> ProgramResult:
        """Traceable."""
        with shared_by(self._shard_call):
            outputs, written = run_forward(self._graph, params, buffers, as_dtypes(inputs, self._dtypes), key)
        return ProgramResult(None, outputs, {}, written)


def as_dtypes(inputs: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
    """The arrays in the dtypes that PyTorch captured with: a loader may have placed them narrower."""
    return [
        value if value.dtype == dtype else lax.convert_element_type(value, dtype)
        for value, dtype in zip(inputs, dtypes, strict=True)
    ]


def tensor_specs(specs: Sequence[ArraySpec], dtypes: Sequence[torch.dtype]) -> list[TensorSpec]:
    """What capture takes, from the shapes that the engine gives and the dtypes that user code saw."""
    return [TensorSpec(tuple(spec.shape), dtype) for spec, dtype in zip(specs, dtypes, strict=True)]


def numpy_dtypes(dtypes: Sequence[torch.dtype]) -> tuple[Any, ...]:
    """The numpy dtypes of torch dtypes."""
    return tuple(numpy_dtype(dtype) for dtype in dtypes)


def batch_axes(small: Sequence[OutSpec], large: Sequence[OutSpec] | None, batch_size: int | None) -> list[int | None]:
    """Per output, the dim that grows with the batch: seen on two batch sizes, or else dim 0 where its size is the batch's."""
    if large is None:
        return [0 if spec.shape and spec.shape[0] == batch_size else None for spec in small]
    return [
        next((dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b), None)
        for one, two in zip(small, large, strict=True)
    ]


def grown(specs: Sequence[OutSpec], axes: Sequence[int | None], factor: int) -> list[OutSpec]:
    """The same inputs with a batch `factor` times as large."""
    found = []
    for spec, axis in zip(specs, axes, strict=True):
        shape = list(spec.shape)
        if axis is not None:
            shape[axis] *= factor
        found.append(spec._replace(shape=torch.Size(shape)))
    return found


def batch_size_of(shapes: Sequence[tuple[int, ...]], axes: Sequence[int | None]) -> int | None:
    """The batch size of inputs: the size of the first batch dim."""
    return next((shape[axis] for shape, axis in zip(shapes, axes, strict=True) if axis is not None), None)


def handles(models: Sequence[ManagedModel]) -> tuple[Any, ...]:
    """The engine's handles of managed models."""
    return tuple([model.handle for model in models])


def rebuild(structure: Key, leaf: Callable[[int], Any]) -> Any:
    """User code's own structure with `leaf(index)` for each tensor."""
    return thaw(structure, lambda described: leaf(described[1]))


def on_all_devices(like: Any, value: Any) -> Any:
    """A host value as an array that is the same on every device, where `like` (a parameter) lies on all of them."""
    with jax.enable_x64(True):
        sharding = like.sharding
        return jax.device_put(value, sharding) if sharding.is_fully_replicated else value
