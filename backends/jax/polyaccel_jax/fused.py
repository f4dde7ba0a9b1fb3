"""The fused step: forward, backward, clipping and update as one program that owns the parameters and the optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
from polyaccel.protocols import LossCall, ProgramCall, StepSpec

from polyaccel_jax.handles import JaxModel, JaxOptimizer
from polyaccel_jax.partition import specs_of
from polyaccel_jax.precision import all_finite
from polyaccel_jax.step import Steps, Work, apply_update, clip_factor, total_norm, unscaled

if TYPE_CHECKING:
    from polyaccel_jax.engine import JaxEngine


class FusedStep:
    """`step(batch, sync)` of one loss function, model and optimizer.

    A lone micro batch (scale 1, nothing accumulated before) is one donated program. With accumulation every micro batch runs
    the backward program, and the last one the update behind it: one large program and one small one, not two large ones.
    """

    def __init__(self, engine: JaxEngine, spec: StepSpec, model: JaxModel, optimizer: JaxOptimizer) -> None:
        self.engine = engine
        self.spec = spec
        self.model = model
        self.optimizer = optimizer
        self.steps: Steps = engine.steps
        self._jitted: dict[Hashable, Callable[..., Any] | None] = {}
        # The last call of the script's own dialect, by the structure of its batch: its next batch needs no new one.
        self._calls: dict[Hashable, tuple[ProgramCall, Hashable]] = {}
        self._is_native = spec.bridge is None

    def __call__(self, batch: Any, sync: bool = True) -> Any:
        """One micro batch; with `sync` the update follows. Returns the loss, or a dict of the loss and the auxiliary values."""
        if self._is_native:
            leaves, treedef = jax.tree.flatten(batch)
            key = (treedef, self.model.source.token)
            found = self._calls.get(key)
            if found is not None and _are_arrays(leaves):
                return self._run(found[0], leaves, sync, found[1])
            call = self.engine.lower(LossCall(self.spec.loss_fn, (self.spec.public_model, batch), {}))
            if _are_arrays(leaves):
                self._calls[(treedef, self.model.source.token)] = (call, call.signature)
            return self._run(call, call.inputs, sync, call.signature)
        bridge: Any = self.spec.bridge
        call = bridge.lower(LossCall(self.spec.loss_fn, (self.spec.public_model, batch), {}), "loss")
        return self._run(call, call.inputs, sync, call.signature)

    def _run(self, call: ProgramCall, inputs: Any, sync: bool, signature: Hashable) -> Any:
        if sync and self.spec.scale == 1.0 and not self.model.gradients:
            optimizer = self.optimizer
            key = (signature, optimizer.source.signature())
            if call.wants_64bit:
                with jax.enable_x64(True):
                    return self._fused(call, inputs, key)
            return self._fused(call, inputs, key)
        call.inputs = inputs
        return self._in_pieces(call, sync)

    def _fused(self, call: ProgramCall, inputs: Any, key: Hashable) -> Any:
        engine, optimizer, model = self.engine, self.optimizer, self.model
        call.inputs = inputs = engine.place(inputs)
        function = self._jitted.get(key, _UNKNOWN)
        if function is _UNKNOWN:
            function = self._jitted[key] = self._compile(call, inputs)
        if function is None:
            call.inputs = inputs
            return self._in_pieces(call, True)
        stream = engine.stream
        work: Work = function.work  # type: ignore[attr-defined]
        work.call = call
        others = () if len(work.models) == 1 else tuple([m.leaves for m in work.models if m is not model])
        loss, outputs, trained, state, changed, following, scaler, skipped = function.jitted(  # type: ignore[union-attr]
            (optimizer.trained_leaves(), optimizer.leaves),
            optimizer.frozen_leaves(),
            others,
            tuple([m.buffer_arrays for m in work.models]),
            stream.base,
            stream.counter(call.draw),
            inputs,
            optimizer.hyperparameters(),
            engine.scaler,
        )
        stream.spent(call.draw, following)
        model.set_leaves(optimizer.take_over(trained, state))
        optimizer.skipped = skipped
        if scaler is not None:
            engine.scaler = scaler
        work.keep_buffers(changed)
        return named_result(call.finish(loss, outputs))

    def _compile(self, call: ProgramCall, inputs: Any) -> _Fused | None:
        """The jitted step, or None where the loss gives gradients that are not this optimizer's alone: those accumulate."""
        work = self.steps.work(call, with_grads=True)
        _, program = work.program(specs_of(inputs))
        mine = {f"{self.model.name}.{name}" for name in self.optimizer.names}
        if self.model not in work.models or not mine.issuperset(program.grad_names):
            return None
        return _Fused(work, self._function(work))

    def _function(self, work: Work) -> Callable[..., Any]:
        engine, optimizer, model = self.engine, self.optimizer, self.model
        max_norm, scale = self.spec.max_grad_norm, self.spec.scale
        prefix = f"{model.name}."

        def step(
            owned: Any, frozen: Any, others: Any, buffers: Any, base: Any, counter: Any, inputs: Any, hyper: Any, scaler: Any
        ) -> Any:
            mine = {**frozen, **dict(zip(optimizer.names, owned[0], strict=True))}
            rest = iter(others)
            params = [[mine[n] for n in model.names] if m is model else next(rest) for m in work.models]
            loss_scale = None if scaler is None else scaler[0]
            result, following = work.run(params, buffers, base, counter, inputs, loss_scale)
            named = {name.removeprefix(prefix): grad for name, grad in result.grads.items()}
            grads = unscaled(named, scale, loss_scale)
            is_finite = None if scaler is None else all_finite(grads)
            if max_norm is not None:
                factor = clip_factor(total_norm(list(grads.values()), 2.0), max_norm)
                grads = {name: grad * factor.astype(grad.dtype) for name, grad in grads.items()}
            trained, state, scaler, skipped = apply_update(optimizer, owned, grads, hyper, scaler, is_finite)
            changed = work.by_model(result.buffers)
            return result.loss, result.outputs, trained, state, changed, following, scaler, skipped

        return jax.jit(step, donate_argnums=0)

    def _in_pieces(self, call: ProgramCall, sync: bool) -> Any:
        result = self.steps.backward(call, self.spec.scale)
        if sync:
            if self.spec.max_grad_norm is not None:
                self.steps.clip_norm([(self.model, None)], self.spec.max_grad_norm, 2.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return named_result(result)


class _Fused:
    __slots__ = ("jitted", "work")

    def __init__(self, work: Work, jitted: Callable[..., Any]) -> None:
        self.work = work
        self.jitted = jitted


_UNKNOWN: Any = object()


def _are_arrays(leaves: list[Any]) -> bool:
    return all([isinstance(leaf, jax.Array) for leaf in leaves])


def named_result(result: Any) -> Any:
    """The loss, or for (loss, auxiliary values) a dict of the loss and its auxiliary values by name."""
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}
