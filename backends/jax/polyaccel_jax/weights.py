"""Token weights: calls whose gradients are weighted on every data shard, and what a gradient window has counted."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import UnsupportedError
from polyaccel.protocols import ArraySpec, ProgramCall, ProgramResult
from polyaccel_jax.mesh import axes_of

if TYPE_CHECKING:
    from polyaccel_jax.engine import JaxEngine
    from polyaccel_jax.handles import JaxModel


class WindowWeights:
    """The sum of the weights of a window, as means over data shards, and the models that got gradients from it.

    Gradients are means over data shards too, so their sum divided by `total` is the weighted mean.
    """

    def __init__(self, total: jax.Array) -> None:
        self.total = total
        self.models: dict[JaxModel, None] = {}
        self.is_divided = False


@final
class WeightedCall:
    """A ProgramCall whose gradients and loss are multiplied by a weight, which is its program's last output.

    `weight` is a scalar, of this process, or the name of an auxiliary value: then each data shard has its own.
    """

    def __init__(self, engine: JaxEngine, call: ProgramCall, weight: Any) -> None:
        self.call = call
        self.name: str | None = weight if isinstance(weight, str) else None
        self.models: Any = call.models
        self.wants_64bit = call.wants_64bit
        self.is_global = call.is_global
        self._num_shards, self._num_feeds = engine.mesh.num_shards, engine.mesh.num_feeds
        self._given: list[Any] = []
        self.input_axes: Sequence[int | None] | None = call.input_axes
        self.draw: int | None = call.draw
        if self.name is None:
            self._refuse_replicas(engine)
            placed = engine.mesh.place(call.inputs, call.input_axes)  # now all shapes are those of the global batch
            call.inputs = placed
            axes = axes_of([array.shape for array in placed]) if call.input_axes is None else call.input_axes
            self._given = [_spread(engine, weight)]
            self.input_axes = (*axes, 0 if self._given[0].ndim else None)
        self.signature: Hashable = ("weighted", call.signature, self.name)

    def _refuse_replicas(self, engine: JaxEngine) -> None:
        model: Any = self.models[0] if self.models else None
        partitioning = engine.default_partitioning if model is None else model.partitioning
        if partitioning == "pmap" and engine.mesh.num_local_shards > 1 and not self.is_global:
            raise UnsupportedError(
                f"weight is one number, and the loss function is computed on each of {engine.mesh.num_local_shards} data shards of this"
                " process, of which every one has its own",
                'return the count beside the loss and name it: loss_fn returns (loss, {"num_tokens": count}), weight="num_tokens"',
            )

    @property
    def inputs(self) -> Sequence[Any]:
        """Those of the call, and a weight that was given as a number."""
        return [*self.call.inputs, *self._given] if self._given else self.call.inputs

    @inputs.setter
    def inputs(self, values: Sequence[Any]) -> None:
        num_given = len(self._given)
        if num_given:
            self._given = list(values[-num_given:])
            values = values[:-num_given]
        self.call.inputs = values

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any) -> Any:
        """The call's program, weighted."""
        own = specs[: len(specs) - len(self._given)]
        program = self.call.build(own, with_grads=with_grads, num_shards=num_shards, shard_call=shard_call)
        if getattr(program, "input_grads", ()):
            raise UnsupportedError(
                "a weighted backward would give an input's gradient without the window's normaliser",
                "detach() the input, or multiply the loss yourself",
            )
        is_one_program = self.is_global or num_shards == 1
        num_losses = self._num_feeds if self.is_global else 1
        return _WeightedProgram(
            program, self.call, self.name, self._num_shards if is_one_program else 1, num_losses=num_losses
        )

    def describe(self, inputs: Sequence[Any]) -> tuple[str, dict[str, str]]:
        """The call, and where its weight comes from."""
        name, facts = self.call.describe(inputs[: len(inputs) - len(self._given)])
        return name, {**facts, "weight": self.name or "a number"}

    def finish(self, loss: Any, outputs: list[Any]) -> Any:
        """What user code gets; the weight is not among the outputs any more."""
        return self.call.finish(loss, outputs)


class _WeightedProgram:
    """Gradients and loss times the weight, 0 where that is 0: a loss may well be 0 / 0 where nothing counts."""

    def __init__(self, inner: Any, call: Any, name: str | None, num_shards: int, *, num_losses: int) -> None:
        self.grad_names: tuple[str, ...] = inner.grad_names
        self.draws_randomly: bool = inner.draws_randomly
        self.writes_params: bool = inner.writes_params
        self._inner = inner
        self._call = call
        self._name = name
        self._num_shards = num_shards  # that one run of the program counts for
        self._num_losses = num_losses  # a recorded loop has a loss on each process, and gives the mean of them

    @property
    def output_axes(self) -> tuple[int | None, ...]:
        """Of the call's outputs, and of the weight, which is one per shard."""
        return (*self._inner.output_axes, None)

    def __call__(self, params: Any, buffers: Any, key: Any, inputs: Sequence[Any], loss_scale: Any) -> ProgramResult:
        own = inputs if self._name is not None else inputs[:-1]
        if self._num_losses > 1:
            return self._of_processes(params, buffers, key, own, loss_scale, inputs[-1])
        result: ProgramResult = self._inner(params, buffers, key, own, loss_scale)
        self._refuse_means()
        weight = self._weight_in(result) if self._name is not None else inputs[-1].sum()
        weight = (
            weight.astype(jnp.float32) / self._num_shards
        )  # the mean over data shards, as where each shard has its own
        result.grads = {name: _times(grad, weight) for name, grad in result.grads.items()}
        result.loss = None if result.loss is None else _times(result.loss, weight)
        result.outputs = [*result.outputs, weight]
        return result

    def _of_processes(
        self, params: Any, buffers: Any, key: Any, inputs: Sequence[Any], loss_scale: Any, entries: Any
    ) -> ProgramResult:
        """The loss of each process times its own weight, through the scale that the program multiplies losses by."""
        entries = entries if entries.ndim else jnp.full(self._num_losses, entries)  # one value on all processes
        weights = entries.reshape(self._num_losses, -1).sum(1) * (self._num_losses / self._num_shards)  # (processes,)
        scale = weights if loss_scale is None else weights * loss_scale
        result: ProgramResult = self._inner(params, buffers, key, inputs, scale)
        self._refuse_means()
        weight = weights.mean()
        result.grads = {name: jnp.where(weight == 0, jnp.zeros_like(grad), grad) for name, grad in result.grads.items()}
        result.loss = None if result.loss is None else _times(result.loss, weight)
        result.outputs = [*result.outputs, weight]
        return result

    def _refuse_means(self) -> None:
        if self._name is None and getattr(self._inner, "averages_shards", False):
            raise UnsupportedError(
                "the loss comes out of the model, which runs on several data shards of this process, each with a count of its own: it is a"
                " mean of means, which one weight does not make the mean over all",
                'write a loss function that returns (loss, {"num_tokens": count}) and use weight="num_tokens", compute the loss outside of'
                ' the model, or use partitioning="sharding"',
            )

    def _weight_in(self, result: ProgramResult) -> jax.Array:
        found = self._call.auxiliary(self._name, result.outputs)
        weight = jnp.asarray(found)
        if weight.size != 1 or weight.dtype == jnp.bool_:
            raise UnsupportedError(
                f"weight={self._name!r} is {weight.dtype} of shape {weight.shape}", "return one count beside the loss"
            )
        return weight.reshape(())


def mean_of(weighted: Any, weight: jax.Array) -> jax.Array:
    """Traced: weighted / weight, and 0 where nothing counts."""
    safe = jnp.where(weight == 0, jnp.ones_like(weight), weight).astype(weighted.dtype)
    return jnp.where(weight == 0, jnp.zeros_like(weighted), weighted / safe)


def _times(value: jax.Array, weight: jax.Array) -> jax.Array:
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return jnp.where(weight == 0, jnp.zeros_like(wide), wide * weight.astype(wide.dtype))


def _spread(engine: JaxEngine, weight: Any) -> jax.Array:
    """A weight of this process as a global array: a scalar, or with several processes one entry per data shard, whose sum counts."""
    mesh = engine.mesh
    if isinstance(weight, jax.Array) and weight.dtype == jnp.float32 and not weight.shape and mesh.is_placed(weight):
        return weight
    if mesh.num_processes == 1:
        if not isinstance(weight, jax.Array):
            weight = np.float32(np.asarray(weight).reshape(()))
        return mesh.place([_scalar(weight)], [None])[0]
    if not isinstance(weight, jax.Array):
        parts = np.zeros(mesh.num_local_shards, np.float32)
        parts[0] = np.asarray(weight).reshape(())
        return mesh.place([parts], [0])[0]
    local = _scalar(engine.local(weight)).reshape(1)  # on the devices: the host does not wait
    sharding, shape = mesh.cut(0), (mesh.num_shards,)
    indices = sharding.addressable_devices_indices_map(shape)
    starts = {device: (index[0].start or 0) if index else 0 for device, index in indices.items()}
    rows = [jax.device_put(local * (start == min(starts.values())), device) for device, start in starts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, rows)


def _scalar(weight: Any) -> Any:
    if math.prod(weight.shape) != 1:
        raise UnsupportedError(f"weight is an array of shape {weight.shape}", "give one number per call")
    return weight.astype(jnp.float32).reshape(())
