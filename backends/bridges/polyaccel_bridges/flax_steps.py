"""The fused step of a flax script on torch: forward, backward, clipping and the optax update in one jitted program.

Parameters stay torch's: the program reads their memory, and what it gives is copied into them. Only optax state, which nobody
else holds, is donated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from polyaccel.protocols import LossCall, StepSpec
from polyaccel_jax import dialect

from .flax_arrays import fence, finish, place
from .flax_modules import HeldModel
from .flax_optimizers import OptaxOptimizer
from .flax_programs import Compiled, FlaxRuntime, torch_call

Step = Callable[[Any, bool], Any]


def fused_step(runtime: FlaxRuntime, spec: StepSpec) -> Step | None:
    """`step(batch, sync)`, or None where the separate calls are needed.

    They are with several processes (torch exchanges gradients), accumulation (torch keeps them), fp16 (torch's scaler looks at
    them) and optimizers of torch's.
    """
    optimizer = getattr(spec.optimizer, "optimizer", None)
    is_alone = runtime.engine.topology.num_processes == 1
    if not is_alone or spec.scale != 1.0 or runtime.plan.precision.loss_scaling is not None:
        return None
    if not isinstance(optimizer, OptaxOptimizer):
        return None
    return _FusedStep(runtime, spec, optimizer)


class _FusedStep:
    """One jitted program per signature. Batches for which that would mean something else take the separate calls."""

    def __init__(self, runtime: FlaxRuntime, spec: StepSpec, optimizer: OptaxOptimizer) -> None:
        self._runtime = runtime
        self._spec = spec
        self._optimizer = optimizer
        self._held: HeldModel = optimizer.held
        self._known: dict[Any, Any] = {}  # calls of earlier batches
        self._programs: dict[Hashable, _Program | None] = {}

    def __call__(self, batch: Any, sync: bool) -> Any:
        spec, runtime = self._spec, self._runtime
        call = dialect.lower_call(LossCall(spec.loss_fn, (spec.public_model, batch), {}), self._known)
        inputs = place(call.inputs, runtime.device)
        specs = tuple([(array.shape, array.dtype.name) for array in inputs])
        key = (call.signature, specs)
        if key not in self._programs:
            self._programs[key] = self._make(call, specs)
        program = self._programs[key]
        # A gradient that is there already belongs into this update.
        if program is None or not sync or any(tensor.grad is not None for tensor in self._held.tensors.values()):
            return self._in_pieces(call, sync)
        loss, outputs = program(self._held, self._optimizer, inputs)
        result = call.finish(loss, outputs)
        return _named(result) if isinstance(result, tuple) else result

    def _make(self, call: Any, specs: Any) -> _Program | None:
        if len(call.models) != 1 or call.models[0] is not self._held:
            return None
        program = _Program(self._runtime, call, specs, self._optimizer, self._spec)
        return program if program.updates_all_gradients else None

    def _in_pieces(self, call: Any, sync: bool) -> Any:
        spec, engine = self._spec, self._runtime.engine
        result = engine.backward(torch_call(self._runtime, call), scale=spec.scale)
        if sync:
            if spec.norm_limit is not None:
                parameters = [tensor for tensor in self._held.tensors.values() if tensor.grad is not None]
                norm = engine.clip_grad_norm(parameters, spec.norm_limit, 2.0)
                if spec.on_grad_norm is not None:
                    spec.on_grad_norm(norm)
            spec.optimizer.step()
            spec.optimizer.zero_grad()
        return _named(result) if isinstance(result, tuple) else result


class _Program(Compiled):
    """Loss and gradients of a call as in Compiled, with the update behind them."""

    def __init__(self, runtime: FlaxRuntime, call: Any, specs: Any, optimizer: OptaxOptimizer, spec: StepSpec) -> None:
        super().__init__(runtime, call, specs, with_grads=True)
        self._prefix = f"{optimizer.held.name}."
        self._update = optimizer.traced_update
        self._names_of_update = optimizer.names
        self._max_norm = spec.max_grad_norm
        self._on_grad_norm = spec.on_grad_norm
        mine = {f"{self._prefix}{name}" for name in optimizer.names}
        self.updates_all_gradients = mine.issuperset(self._program.grad_names)
        self._fused = jax.jit(self._run_fused, donate_argnums=4)

    def __call__(  # type: ignore[override]
        self, held: HeldModel, optimizer: OptaxOptimizer, inputs: list[jax.Array]
    ) -> tuple[Any, list[jax.Array]]:
        params, buffers = held.leaves(held.names), held.leaves(held.buffer_names)
        fence(self._runtime.engine.device)
        loss, outputs, new, leaves, changed, norm = finish(
            self._fused(params, buffers, self._draw(), inputs, optimizer.leaves)
        )
        if self._on_grad_norm is not None:
            self._on_grad_norm(norm)
        optimizer.leaves = leaves
        written = dict(zip(self._names_of_update, new, strict=True))
        written.update((name.removeprefix(self._prefix), value) for name, value in changed.items())
        held.write(written)
        return loss, outputs

    def _run_fused(self, params: Any, buffers: Any, seed: Any, inputs: Any, leaves: Any) -> Any:
        loss, outputs, grads, changed = self._run(params, buffers, seed, inputs, None)
        found = {name.removeprefix(self._prefix): grad for name, grad in grads.items()}
        norm = None if self._max_norm is None and self._on_grad_norm is None else _norm(found)
        if self._max_norm is not None:
            found = _clipped(found, norm, self._max_norm)
        named = dict(zip((name.removeprefix(self._prefix) for name in self._names), params, strict=True))
        new, leaves = self._update([named[name] for name in self._names_of_update], found, leaves)
        return loss, outputs, new, leaves, changed, None if self._on_grad_norm is None else norm


def _norm(grads: dict[str, jax.Array]) -> jax.Array:
    return jnp.linalg.norm(jnp.stack([jnp.linalg.norm(grad.ravel()) for grad in grads.values()]))


def _clipped(grads: dict[str, jax.Array], total: Any, max_norm: float) -> dict[str, jax.Array]:
    """As torch.nn.utils.clip_grad_norm_ has it."""
    factor = jnp.minimum(max_norm / (total + 1e-6), 1.0)
    return {name: grad * factor.astype(grad.dtype) for name, grad in grads.items()}


def _named(result: tuple[Any, Any]) -> dict[str, Any]:
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}
