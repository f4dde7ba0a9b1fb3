"""Runs the flax dialect's calls for torch: one jitted program per signature gives loss, gradients and new buffers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from polyaccel.protocols import ArraySpec, LossCall, ProgramCall
from polyaccel_jax.dialect import compilation_cache

from .flax_arrays import fence, finish, is_key, jax_device, place, to_torch
from .flax_modules import HeldModel

if TYPE_CHECKING:
    from polyaccel.plan import Plan

# A float16 number ends at 65504, and the loss itself may be one: a scale inside the program must stay below that.
_LARGEST_INNER_SCALE = 2.0**15


class Outcome(NamedTuple):
    """What a program gave, finished: jax arrays that nobody else holds."""

    loss: jax.Array | None
    outputs: list[jax.Array]
    grads: dict[str, jax.Array]  # by `<model name>.<name in the model>`


class FlaxRuntime:
    """What the flax dialect may ask of an engine, on the device of a torch engine. `num_compiles` counts compiled programs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        compilation_cache.enable(engine.config.compilation_cache)
        self.device: jax.Device = jax_device(engine.device)
        self.num_compiles = 0
        # Gradients of the last backward pass by address, until an update takes them: the optax update reads the same memory.
        self.gradients: dict[int, jax.Array] = {}
        self._handed: list[tuple[torch.Tensor, jax.Array]] = []  # what the last call gave torch, and where it came from
        self._inner_scale: torch.Tensor | None = None

    # -- what the dialect asks -------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The engine's plan."""
        plan: Plan = self.engine.plan
        return plan

    @property
    def gradient_state(self) -> Any:
        """The accumulation window."""
        return self.engine.gradient_state

    def local(self, array: Any) -> Any:
        """Every array is this process's own."""
        return array

    def run_forward(self, call: Any) -> Any:
        """Run a call without gradients, update buffers, and return its outputs as jax arrays."""
        outcome = self.run(call, with_grads=False)
        return call.finish(None, outcome.outputs)

    # -- programs --------------------------------------------------------------------------------------------------------

    def run(self, call: Any, *, with_grads: bool, loss_scale: Any = None) -> Outcome:
        """Run a call to its end; what it changed in its models' buffers is written to them."""
        inputs = place(call.inputs, self.device)
        specs = tuple([(array.shape, array.dtype.name) for array in inputs])
        key = (call.signature, specs, with_grads)
        programs = call.models[0].programs
        compiled = programs.get(key)
        if compiled is None:
            compiled = programs[key] = Compiled(self, call, specs, with_grads=with_grads)
        return compiled(call.models, inputs, loss_scale)

    # -- under torch's autograd ------------------------------------------------------------------------------------------

    def compute(self, call: Any) -> Any:
        """What a torch engine calls as its loss function: the loss, or (loss, auxiliary values), as torch tensors."""
        first, *others = [model.handle for model in call.models]
        loss, outputs = first(call, others)
        return call.finish(loss, outputs)

    def differentiable(self, call: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss as the output of one autograd function over all parameters that get a gradient."""
        if not torch.is_grad_enabled():
            outcome = self.run(call, with_grads=False)
            assert outcome.loss is not None
            return to_torch(outcome.loss), [to_torch(output) for output in outcome.outputs]
        parameters = {
            f"{model.name}.{name}": model.tensors[name]
            for model in call.models
            for name in model.names
            if model.tensors[name].requires_grad
        }
        outputs: list[torch.Tensor] = []

        def forward() -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor | None]:
            scale = self.inner_scale()
            self.gradients.clear()
            outcome = self.run(call, with_grads=True, loss_scale=None if scale is None else float_argument(scale))
            assert outcome.loss is not None
            outputs.extend(to_torch(output) for output in outcome.outputs)
            loss = to_torch(outcome.loss)
            self._handed = list(zip((loss, *outputs), (outcome.loss, *outcome.outputs), strict=True))
            grads = [
                to_torch(outcome.grads[name]) if name in outcome.grads else _no_gradient(call.models, name, parameter)
                for name, parameter in parameters.items()
            ]
            self.gradients.update((array.unsafe_buffer_pointer(), array) for array in outcome.grads.values())
            return loss, grads, scale

        loss = _JaxLoss.apply(forward, self, *parameters.values())
        return loss, outputs

    def array_of(self, tensor: torch.Tensor) -> jax.Array | None:
        """The jax array that a tensor of the last call was made of; None for another tensor, or one that was written to."""
        for given, array in self._handed:
            if (
                given.data_ptr() == tensor.data_ptr()
                and (given.shape, given.dtype, given.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
                and tensor._version == 0
                and tensor.numel()
            ):
                return array
        return None

    def inner_scale(self) -> torch.Tensor | None:
        """fp16: what the loss is multiplied by inside the next program; None in other precisions.

        torch's GradScaler multiplies the loss outside, after the gradients were computed. Its last scale stands in for it
        inside, and the rest is made good in float32 when the real one arrives.
        """
        scaling = self.plan.precision.loss_scaling
        if scaling is not None and self._inner_scale is None:
            self._inner_scale = torch.tensor(min(scaling.init_scale, _LARGEST_INNER_SCALE), device=self.engine.device)
        return self._inner_scale

    def note_scale(self, incoming: torch.Tensor) -> None:
        """fp16: take over the scale that arrived in a backward pass; never zero, never beyond float16."""
        self._inner_scale = incoming.detach().abs().clamp(2.0**-24, _LARGEST_INNER_SCALE)


class Compiled:
    """One jitted program of calls with equal signatures and input specs."""

    def __init__(
        self, runtime: FlaxRuntime, call: ProgramCall, specs: Sequence[tuple[Any, str]], *, with_grads: bool
    ) -> None:
        self._runtime = runtime
        self._program = call.build(
            [ArraySpec(shape, dtype) for shape, dtype in specs],
            with_grads=with_grads,
            num_shards=1,
            shard_call=_NoReplicas(),
        )
        models: Any = call.models
        self._names = [f"{model.name}.{name}" for model in models for name in model.names]
        self._buffer_names = [f"{model.name}.{name}" for model in models for name in model.buffer_names]
        topology = runtime.engine.topology
        self._fold = topology.process_index if topology.num_processes > 1 else None
        self._jitted = jax.jit(self._run)

    def __call__(self, models: Sequence[HeldModel], inputs: list[jax.Array], loss_scale: Any) -> Outcome:
        params = [leaf for model in models for leaf in model.leaves(model.names)]
        buffers = [leaf for model in models for leaf in model.leaves(model.buffer_names)]
        fence(self._runtime.engine.device)
        # Finished before torch goes on: it writes to what this reads.
        result = finish(self._jitted(params, buffers, self._draw(), inputs, loss_scale))
        loss, outputs, grads, changed = result
        for model in models:
            prefix = f"{model.name}."
            new = {name.removeprefix(prefix): value for name, value in changed.items() if name.startswith(prefix)}
            if new:
                model.write(new)
        return Outcome(loss, outputs, grads)

    def _run(self, params: Any, buffers: Any, seed: Any, inputs: Any, loss_scale: Any) -> Any:
        self._runtime.num_compiles += 1
        # Behind the barrier nothing that comes out can be the very memory of what goes in, which torch and the user write to.
        params, inputs = jax.lax.optimization_barrier((params, inputs))
        plain = {index: buffer for index, buffer in enumerate(buffers) if not is_key(buffer)}
        plain = jax.lax.optimization_barrier(plain)
        buffers = [plain.get(index, buffer) for index, buffer in enumerate(buffers)]
        named_params = dict(zip(self._names, params, strict=True))
        named_buffers = dict(zip(self._buffer_names, map(self._of_this_process, buffers), strict=True))
        key = self._of_this_process(jax.random.fold_in(jax.random.key(seed[0]), seed[1]))
        result = self._program(named_params, named_buffers, key, inputs, loss_scale)
        return result.loss, result.outputs, result.grads, result.buffers

    def _of_this_process(self, value: Any) -> Any:
        """Traced: random keys folded with the process, so that data-parallel replicas drop different neurons."""
        return value if self._fold is None or not is_key(value) else jax.random.fold_in(value, self._fold)

    def _draw(self) -> np.ndarray[Any, Any]:
        """(2,) uint32 from torch's generator, which `set_seed` seeds; programs that do not use them draw nothing."""
        if not self._program.draws_randomly:
            return _NO_SEED
        return torch.empty(2, dtype=torch.int32).random_(0, 2**31 - 1).numpy().astype(np.uint32)


_NO_SEED = np.zeros(2, np.uint32)


class _JaxLoss(torch.autograd.Function):
    """A loss whose gradients were computed together with it."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], runtime: FlaxRuntime, *parameters: torch.Tensor) -> torch.Tensor:
        loss, ctx.grads, ctx.scale = compute()
        ctx.runtime = runtime
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor | None) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None  # the memory is handed out: torch accumulates into it and clips it in place
        if grads is None:
            raise RuntimeError("the gradients of this loss were taken already; compute the loss again")
        if incoming is None:
            return (None, None, *(None for _ in grads))
        factor = incoming
        if ctx.scale is not None:
            factor = incoming / ctx.scale
            ctx.runtime.note_scale(incoming)
        present = [grad for grad in grads if grad is not None]
        are_distinct = len({grad.data_ptr() for grad in present}) == len(present)
        if present and (not are_distinct or factor.is_cuda or float(factor) != 1.0):
            present = list(torch._foreach_mul(present, factor))
        scaled = iter(present)
        return (None, None, *(None if grad is None else next(scaled) for grad in grads))


def _no_gradient(models: Sequence[HeldModel], name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """For a parameter that no optimizer trains: none, but zeros where DistributedDataParallel waits for all of them."""
    is_replicated = any(name.startswith(f"{model.name}.") and model.is_replicated for model in models)
    return torch.zeros_like(parameter) if is_replicated else None


def float_argument(scale: torch.Tensor) -> Any:
    """A float32 scalar as an argument of a program."""
    return np.float32(scale) if scale.device.type == "cpu" else jax.dlpack.from_dlpack(scale)


class _NoReplicas:
    """The ShardCall of a program of one data shard, which asks for nothing."""

    num_sequence_parts = 1

    def __call__(self, function: Any, in_axes: Any, out_axes: Any) -> Any:
        raise AssertionError("a flax program of one data shard has no replica parts")

    def sum_over_shards(self, value: Any) -> Any:
        raise AssertionError("a flax program of one data shard has no replica parts")


def torch_call(runtime: FlaxRuntime, call: Any) -> LossCall:
    """A FlaxCall as a call that a torch engine makes and differentiates."""
    return LossCall(runtime.compute, (call,), {})
