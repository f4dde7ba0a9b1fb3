"""The fused step: forward, backward, clipping and update as one program that owns the parameters and the optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from polyaccel.protocols import LossCall, ProgramCall, StepSpec
from polyaccel_jax.handles import JaxModel, JaxOptimizer
from polyaccel_jax.partition import specs_of
from polyaccel_jax.precision import all_finite
from polyaccel_jax.step import Steps, Work, apply_update, clip_factor, total_norm, unscaled
from polyaccel_jax.weights import WeightedCall, mean_of

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
        self._is_lone = spec.scale == 1.0
        self._programs: dict[Hashable, _Fused | None] = {}
        # A script of the engine's own dialect: by structure of its batch and mode of its model, the call and its program.
        # The next batch of the kind needs neither a new call nor a look at its signature.
        self._known: dict[Hashable, tuple[ProgramCall, _Fused | None]] = {}
        self._is_native = spec.bridge is None
        self._source: Any = model.source
        self._are_placed = engine.mesh.are_placed

    def __call__(self, batch: Any, sync: bool = True) -> Any:
        """One micro batch; with `sync` the update follows. Returns the loss, or a dict of the loss and the auxiliary values."""
        if not self._is_native:
            bridge: Any = self.spec.bridge
            call = bridge.lower(LossCall(self.spec.loss_fn, (self.spec.public_model, batch), {}), "loss")
            if self.spec.weight is not None:
                call = self._weighted(call)
            return self._run(call, self._program(call, sync), sync)
        leaves, treedef = _flatten(batch)
        key = (treedef, self._source.token, sync)
        known = self._known.get(key)
        if known is not None and self._are_placed(leaves):
            call, program = known
            call.inputs = leaves
            if program is not None and not self.model.gradients:
                return program.run(call)
            return self._in_pieces(call, sync)
        call = self._weighted(self.engine.lower(LossCall(self.spec.loss_fn, (self.spec.public_model, batch), {})))
        program = self._program(call, sync)
        result = self._run(call, program, sync)
        if all(
            isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves
        ):  # else some leaves are static parts of the call
            self._known[key] = (call, program)
        return result

    def _weighted(self, call: ProgramCall) -> ProgramCall:
        weight = self.spec.weight
        return call if weight is None else WeightedCall(self.engine, call, weight)

    def _run(self, call: ProgramCall, program: _Fused | None, sync: bool) -> Any:
        if program is None or self.model.gradients:
            return self._in_pieces(call, sync)
        if call.wants_64bit:
            with jax.enable_x64(True):
                return program.run(call)
        return program.run(call)

    def _program(self, call: ProgramCall, sync: bool) -> _Fused | None:
        """The one program for a call; None where it runs in pieces.

        That is with accumulation, where the loss gives gradients that are not this optimizer's alone (those accumulate), and where
        the program itself writes to parameters: the update starts from what it wrote.
        """
        if not sync or not self._is_lone:
            return None
        with self.engine.dtypes(call.wants_64bit):
            call.inputs = self.engine.mesh.place(call.inputs, call.input_axes)
            specs = specs_of(call.inputs)
            key = (call.signature, specs, self.optimizer.source.signature())
            if key in self._programs:
                return self._programs[key]
            work = self.steps.work(call, with_grads=True)
            program = work.program(call.inputs).program
            mine = {f"{self.model.name}.{name}" for name in self.optimizer.names}
            fused = None
            is_alone = mine.issuperset(program.grad_names) and not program.writes_params
            if self.model in work.models and is_alone:
                fused = _Fused(self.engine, work, self.optimizer, self._function(work), self.spec.on_grad_norm)
            self._programs[key] = fused
            return fused

    def _function(self, work: Work) -> Callable[..., Any]:
        optimizer, model = self.optimizer, self.model
        max_norm, scale, tells_norm = self.spec.max_grad_norm, self.spec.scale, self.spec.on_grad_norm is not None
        prefix = f"{model.name}."

        def step(
            owned: Any,
            frozen: Any,
            others: Any,
            buffers: Any,
            base: Any,
            counter: Any,
            inputs: Any,
            hyper: Any,
            scaler: Any,
        ) -> Any:
            mine = {**frozen, **dict(zip(optimizer.names, owned[0], strict=True))}
            rest = iter(others)
            params = [[mine[n] for n in model.names] if m is model else next(rest) for m in work.models]
            loss_scale = None if scaler is None else scaler[0]
            result, following = work.run(
                params,
                buffers,
                base,
                counter,
                inputs,
                loss_scale,
                "train_step",
                options=str(optimizer.source.signature()),
            )
            if work.is_weighted:
                weight = result.outputs.pop()
                result.loss = mean_of(result.loss, weight)
                result.grads = {name: mean_of(grad, weight) for name, grad in result.grads.items()}
            named = {name.removeprefix(prefix): grad for name, grad in result.grads.items()}
            grads = unscaled(named, scale, loss_scale)
            is_finite = None if scaler is None else all_finite(grads)
            norm = total_norm(list(grads.values()), 2.0) if max_norm is not None or tells_norm else None
            if max_norm is not None and norm is not None:
                factor = clip_factor(norm, max_norm)
                grads = {name: grad * factor.astype(grad.dtype) for name, grad in grads.items()}
            trained, state, scaler, skipped = apply_update(optimizer, owned, grads, hyper, scaler, is_finite)
            changed = work.by_model(result.buffers)
            told = norm if tells_norm else None
            return result.loss, result.outputs, trained, state, changed, following, scaler, skipped, told

        return jax.jit(step, donate_argnums=0)

    def _in_pieces(self, call: ProgramCall, sync: bool) -> Any:
        state = self.engine.gradient_state
        if self.spec.weight is None:
            result = self.steps.backward(call, self.spec.scale)
        else:
            result = self.engine.add_weighted(call)
        if sync:
            if self.spec.weight is not None:
                self.engine.normalise_gradients()
            elif state is not None and state.tail_factor != 1.0:
                self.engine.scale_gradients(state.tail_factor)
            if self.spec.norm_limit is not None:
                norm = self.steps.clip_norm([(self.model, None)], self.spec.norm_limit, 2.0)
                if self.spec.on_grad_norm is not None:
                    self.spec.on_grad_norm(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return named_result(result)


class _Fused:
    """One compiled step. Everything that does not change from step to step is looked up here, once."""

    def __init__(
        self,
        engine: JaxEngine,
        work: Work,
        optimizer: JaxOptimizer,
        jitted: Callable[..., Any],
        on_grad_norm: Callable[[Any], None] | None,
    ) -> None:
        self.engine = engine
        self.work = work
        self.optimizer = optimizer
        self.model = optimizer.model
        self.jitted = jitted
        self._on_grad_norm = on_grad_norm
        self._compiles = engine.compiles
        self._run = engine.compiles.run
        self._note_exchange = engine.note_exchange
        self._is_whole = optimizer.covers_model
        self._is_compared = engine.lockstep is not None
        self._hyperparameters = optimizer.hyperparameters
        self._others = tuple(model for model in work.models if model is not optimizer.model)
        self._idle: tuple[jax.Array, jax.Array] | None = (
            None  # any key and counter, once the program is known not to draw
        )

    def run(self, call: ProgramCall) -> Any:
        """The step on the call's inputs."""
        engine, optimizer, model = self.engine, self.optimizer, self.model
        if self._idle is not None:
            base, counter = self._idle
        else:
            base, counter = engine.stream.base, engine.stream.counter(call.draw)
            self.work.call = call  # a new input signature is built by the latest call
        is_whole = self._is_whole
        if self._is_compared:
            self.work.compare(call, call.inputs)
        self._note_exchange()
        loss, outputs, trained, state, changed, following, scaler, skipped, norm = self._run(
            self.jitted,
            (model.leaves if is_whole else optimizer.trained_leaves(), optimizer.leaves),
            {} if is_whole else optimizer.frozen_leaves(),
            tuple([each.leaves for each in self._others]) if self._others else (),
            tuple([each.buffer_arrays for each in self.work.models]) if self._others else (model.buffer_arrays,),
            base,
            counter,
            call.inputs,
            self._hyperparameters(),
            engine.scaler,
        )
        if is_whole:
            optimizer.leaves, model.leaves = state, trained
        else:
            model.leaves = optimizer.take_over(trained, state)
        model.forget_views()
        self._compiles.num_updates += 1
        if engine.planner is not None:
            engine.planner.updated(optimizer)
        if following is not None:
            engine.stream.spent(call.draw, following)
        elif self._idle is None:
            self._idle = (base, counter)
        if scaler is not None:
            optimizer.skipped = skipped
            engine.scaler = scaler
        if norm is not None and self._on_grad_norm is not None:
            self._on_grad_norm(norm)
        if any(changed):
            self.work.keep_buffers(changed)
        engine.pace(loss)
        result = call.finish(loss, outputs)
        return named_result(result) if type(result) is tuple else result


_flatten = jax.tree_util.default_registry.flatten  # what jax.tree.flatten calls, without its wrapper


def named_result(result: Any) -> Any:
    """The loss, or for (loss, auxiliary values) a dict of the loss and its auxiliary values by name."""
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}
