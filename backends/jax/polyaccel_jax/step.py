"""The compiled pieces of a step: forward, backward, update, clipping. One program per signature, found again by one look-up."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import UnsupportedError
from polyaccel.protocols import ArraySpec, Program, ProgramCall, ProgramResult
from polyaccel_jax import partition
from polyaccel_jax.agreed import require_same_rows, require_same_values
from polyaccel_jax.handles import JaxModel, JaxOptimizer
from polyaccel_jax.partition import Arguments, Layout, specs_of
from polyaccel_jax.precision import all_finite, next_scaler
from polyaccel_jax.random_stream import draw_key, next_counter
from polyaccel_jax.weights import WeightedCall, WindowWeights, mean_of

if TYPE_CHECKING:
    from polyaccel_jax.engine import JaxEngine

_log = logging.getLogger("polyaccel.jax")
_MANY_SIGNATURES = 64
_NUMBER = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|inf|nan)|True|False|None")

Named = dict[str, jax.Array]
Target = tuple[JaxModel, Collection[str] | None]  # parameters whose gradients are clipped; None: all of the model's


@dataclass(frozen=True, slots=True)
class Built:
    """A program, how its inputs are cut, and per model the names of the parameters that it gives gradients of."""

    layout: Layout
    program: Program
    grad_names: tuple[tuple[str, ...], ...]
    called: str = ""
    constants: tuple[str, ...] = ()  # of a program that spans all processes


class Work:
    """What all calls of one signature share: their programs by input specs, and the jitted functions around them.

    Programs are built outside of the trace (they may capture, and may refuse) by the latest call.
    """

    def __init__(self, engine: JaxEngine, call: ProgramCall, *, with_grads: bool) -> None:
        self.engine = engine
        self.call: ProgramCall = call
        self.with_grads = with_grads
        self.models: tuple[JaxModel, ...] = tuple(call.models)  # type: ignore[arg-type]
        self.names = tuple(model.names for model in self.models)
        self.is_global = call.is_global
        self.is_weighted = isinstance(call, WeightedCall)
        self.partitioning = self.models[0].partitioning if self.models else engine.default_partitioning
        self.functions: dict[Hashable, Callable[..., Any]] = {}
        self._programs: dict[Hashable, Built] = {}

    def program(self, inputs: Sequence[Any]) -> Built:
        """The program for arrays (or tracers) of these specs. Raises what the call's `build` raises."""
        key = tuple([(array.shape, array.dtype) for array in inputs])
        found = self._programs.get(key)
        if found is None:
            axes, mesh = self.call.input_axes, self.engine.mesh
            if mesh.num_feeds < mesh.num_processes:  # the first batch of a kind tells whether a script means it
                require_same_rows(self.engine.collectives, inputs, mesh.num_processes // mesh.num_feeds)
            layout = partition.layout_of(
                mesh,
                self.partitioning,
                specs_of(inputs),
                axes,
                with_grads=self.with_grads,
                is_piece=self.is_global,
            )
            if mesh.num_feeds > 1 and layout.num_replicas == 1:
                shared = [array for array, axis in zip(inputs, layout.axes, strict=True) if axis is None]
                shared = [array for array in shared if mesh.is_host_copy(array)]
                require_same_values(self.engine.collectives, self.call.describe(inputs)[0], shared)
            program = self.engine.compiles.build(
                lambda: partition.build(mesh, layout, self.call, with_grads=self.with_grads)
            )
            wanted = self.by_model(dict.fromkeys(program.grad_names))  # type: ignore[arg-type]
            called = ""
            constants: tuple[str, ...] = ()
            if self.engine.lockstep is not None:
                called, facts = self.call.describe(inputs)
                if not self.is_global and layout.num_replicas == 1:
                    constants = tuple(f"{name}={text}" for name, text in facts.items() if _NUMBER.fullmatch(text))
            found = self._programs[key] = Built(
                layout, program, tuple(tuple(names) for names in wanted), called, constants
            )
        return found

    def compare(self, call: ProgramCall, inputs: Sequence[Any]) -> None:
        """Before this call runs: hold what must be alike on all processes against what the others have (see `Lockstep`).
        In jobs of several processes alone."""
        lockstep = self.engine.lockstep
        assert lockstep is not None
        inner: Any = call.call if isinstance(call, WeightedCall) else call
        own = getattr(inner, "constants", None)
        if own is None and (self.is_global or not self.with_grads):
            return
        built = self.program(inputs)
        is_whole = built.layout.num_replicas == 1
        constants = built.constants
        if own is not None:
            constants = own[0] + own[1] if is_whole else own[0]
        value_of = self.engine.mesh.host_value
        shared = (
            [array for array, axis in zip(inputs, built.layout.axes, strict=True) if axis is None] if is_whole else []
        )
        values = [value for array in shared if (value := value_of(array)) is not None]
        lockstep.note(built.called, constants, values)

    @property
    def is_outdated(self) -> bool:
        """Whether an optimizer has made parameters of buffers since."""
        return tuple([model.names for model in self.models]) != self.names

    def run(
        self,
        params: Sequence[Sequence[jax.Array]],
        buffers: Sequence[Named],
        base: jax.Array,
        counter: jax.Array,
        inputs: Sequence[jax.Array],
        loss_scale: jax.Array | None,
        form: str,
        **facts: str,
    ) -> tuple[ProgramResult, jax.Array | None]:
        """Traced: the program's result, and the following random counter if the program draws.

        `form` says which step this is part of, and `facts` what else than the call its program depends on.
        """
        name, known = self.call.describe(inputs)
        self.engine.compiles.tracing(f"{form} of {name}", {**known, **facts})
        built = self.program(inputs)
        layout, program = built.layout, built.program
        all_params: Named = {}
        all_buffers: Named = {}
        for model, names, leaves, held in zip(self.models, self.names, params, buffers, strict=True):
            all_params.update({f"{model.name}.{name}": leaf for name, leaf in zip(names, leaves, strict=True)})
            all_buffers.update({f"{model.name}.{name}": value for name, value in held.items()})
        key = draw_key(base, counter)
        args = Arguments(all_params, all_buffers, key, list(inputs), loss_scale)
        result = partition.run(self.engine.mesh, layout, program, self.is_global, args)
        return result, self.engine.constrain(next_counter(counter)) if program.draws_randomly else None

    def by_model(self, values: Named) -> tuple[Named, ...]:
        """Traced: values named `<model>.<name>`, one dict per model."""
        return tuple(
            {name.removeprefix(f"{model.name}."): v for name, v in values.items() if name.startswith(f"{model.name}.")}
            for model in self.models
        )

    def keep_buffers(self, changed: Sequence[Named]) -> None:
        """Hand the models the buffers that a program changed."""
        for model, values in zip(self.models, changed, strict=True):
            if values:
                model.set_leaves(None, values)


class Steps:
    """The compiled programs of one engine."""

    def __init__(self, engine: JaxEngine) -> None:
        self.engine = engine
        self._work: dict[Hashable, Work] = {}
        self._functions: dict[Hashable, Callable[..., Any]] = {}
        self._zero: jax.Array | None = None

    def work(self, call: ProgramCall, *, with_grads: bool) -> Work:
        """What calls of this signature share; the call becomes the one that builds."""
        key = (call.signature, with_grads)
        found = self._work.get(key)
        if found is None or found.is_outdated:
            found = self._work[key] = Work(self.engine, call, with_grads=with_grads)
            if len(self._work) == _MANY_SIGNATURES:
                _log.warning(
                    "%d different functions or argument structures were compiled for this engine. A loss function that captures"
                    " another object in every step compiles in every step: pass what changes as an argument.",
                    _MANY_SIGNATURES,
                )
        found.call = call
        return found

    # -- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, call: ProgramCall) -> Any:
        """Run a call without gradients."""
        engine, stream = self.engine, self.engine.stream
        with engine.dtypes(call.wants_64bit):
            work = self.work(call, with_grads=False)
            function = work.functions.get("forward") or _forward_function(work)
            inputs = engine.mesh.place(call.inputs, call.input_axes)
            work.program(inputs)
            if engine.lockstep is not None:
                work.compare(call, inputs)
            outputs, changed, following = engine.compiles.run(
                function,
                tuple([model.leaves for model in work.models]),
                tuple([model.buffer_arrays for model in work.models]),
                stream.base,
                stream.counter(call.draw),
                inputs,
            )
        stream.spent(call.draw, following)
        work.keep_buffers(changed)
        engine.pace(outputs[0] if outputs else None)
        return call.finish(None, outputs)

    # -- backward --------------------------------------------------------------------------------------------------------

    def backward(self, call: ProgramCall, scale: float, window: WindowWeights | None = None) -> Any:
        """Add scale * gradients to those that the call's models hold. The weight of a WeightedCall is added to its window."""
        engine, stream = self.engine, self.engine.stream
        with engine.dtypes(call.wants_64bit):
            work = self.work(call, with_grads=True)
            inputs = engine.mesh.place(call.inputs, call.input_axes)
            accumulates = scale != 1.0 if window is None else engine.gradient_state.num_steps > 1
            held = self._held(work.models, work.program(inputs).grad_names, accumulates)
            function = work.functions.get(scale) or _backward_function(work, scale)
            if engine.lockstep is not None:
                work.compare(call, inputs)
            engine.note_exchange()
            loss, outputs, grads, changed, following, is_finite, total = engine.compiles.run(
                function,
                held,
                tuple([model.leaves for model in work.models]),
                tuple([model.buffer_arrays for model in work.models]),
                stream.base,
                stream.counter(call.draw),
                inputs,
                engine.scaler,
                None if window is None else window.total,
            )
        stream.spent(call.draw, following)
        if window is not None:
            window.total = total
            window.models.update(dict.fromkeys(work.models))
        for model, new in zip(work.models, grads, strict=True):
            if new:
                model.gradients = {**model.gradients, **new} if model.gradients else new
                model.gradients_are_shared = False
                if is_finite is not None:
                    self._note_overflow(model, is_finite)
        work.keep_buffers(changed)
        engine.pace(loss)
        return call.finish(loss, outputs)

    def _held(
        self, models: Sequence[JaxModel], grad_names: Sequence[Sequence[str]], accumulates: bool
    ) -> tuple[Named, ...]:
        """The gradients to add to, per model; they are donated.

        With accumulation the first micro batch adds to zeros, so that one program serves all of them.
        """
        held: list[Named] = []
        for model, names in zip(models, grad_names, strict=True):
            have = self._own_gradients(model, names) if model.gradients else {}
            if have or accumulates:
                missing = [name for name in names if name not in have]
                if missing:
                    have = {**have, **self.zeros(model, missing)}
            held.append(have)
        return tuple(held)

    def _own_gradients(self, model: JaxModel, names: Collection[str] | None) -> Named:
        """The gradients of these parameters (None: all), copied where user code may hold one: they will be donated.

        A copy is cheap beside a second program that would not donate.
        """
        have = {name: grad for name, grad in model.gradients.items() if names is None or name in names}
        if not have or not model.gradients_are_shared:
            return have
        copies: Named = self.engine.compiles.run(self.function("copies", lambda: jax.jit(_copies)), have)
        return copies

    def _note_overflow(self, model: JaxModel, is_finite: jax.Array) -> None:
        model.overflow = is_finite if model.overflow is None else self._both(model.overflow, is_finite)

    def _both(self, first: jax.Array, second: jax.Array) -> jax.Array:
        both: jax.Array = self.engine.compiles.run(
            self.function("both", lambda: jax.jit(jnp.logical_and)), first, second
        )
        return both

    def zeros(self, model: JaxModel, names: Sequence[str]) -> Named:
        """Gradients of zero for these parameters."""
        specs = tuple((name, model.params[name].shape, _gradient_dtype(model.params[name])) for name in names)

        def make() -> Callable[[], Named]:
            mesh = self.engine.mesh
            if self.engine.planner is not None:
                shapes = [ArraySpec(shape, dtype.name) for _, shape, dtype in specs]
                return lambda: dict(zip(names, mesh.keep(shapes, map(model.full, names)), strict=True))
            return jax.jit(
                lambda: {name: jnp.zeros(shape, dtype) for name, shape, dtype in specs},
                out_shardings={
                    name: mesh.kept(jax.ShapeDtypeStruct(shape, dtype), model.full(name))
                    for name, shape, dtype in specs
                },
            )

        return self.function(("zeros", model.name, specs), make)()

    def scale_gradients(self, models: Sequence[JaxModel], factor: Any, *, divides: bool = False) -> None:
        """Multiply the gradients that these models hold by a scalar, or divide them: by 0 they become 0."""
        targets: list[Target] = [(model, None) for model in models if model.gradients]
        if not targets:
            return
        held = tuple([self._own_gradients(model, None) for model, _ in targets])
        owners = tuple([model.name for model, _ in targets])

        def make() -> Callable[..., Any]:
            def scaled(grads: tuple[Named, ...], factor: jax.Array) -> tuple[Named, ...]:
                what = "normalise_gradients" if divides else "scale_gradients"
                self.engine.compiles.tracing(what, {"gradients": f"{sum(map(len, grads))} arrays"})
                change = mean_of if divides else lambda grad, by: grad * by.astype(grad.dtype)
                changed: tuple[Named, ...] = jax.tree.map(lambda grad: change(grad, factor), grads)
                return self.engine.keep_gradients(owners, changed)

            return jax.jit(scaled, donate_argnums=0)

        with self.engine.dtypes(any(model.wants_64bit for model, _ in targets)):
            changed = self.engine.compiles.run(self.function(("scale gradients", divides, owners), make), held, factor)
        _replace_gradients(targets, changed)

    def zero(self) -> jax.Array:
        """A float32 scalar of 0 on all devices, of which a window's sum of weights starts."""
        if self._zero is None:
            self._zero = self.engine.mesh.replicate([np.float32(0)])[0]
        return self._zero

    def function(self, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """A jitted function made once per key."""
        found = self._functions.get(key)
        if found is None:
            found = self._functions[key] = make()
        return found

    # -- clipping --------------------------------------------------------------------------------------------------------

    def clip_norm(self, targets: Sequence[Target], max_norm: float, norm_type: float) -> Any:
        """Clip the gradients of the targets by their total norm; returns the norm before, on the device."""
        if np.isnan(norm_type) or norm_type <= 0:
            raise UnsupportedError(f"norm_type={norm_type!r} is no norm", "use a positive number, or inf")
        held = tuple([self._own_gradients(model, names) for model, names in targets])
        owners = tuple([model.name for model, _ in targets])

        def make() -> Callable[..., Any]:
            def clip(grads: tuple[Named, ...]) -> tuple[jax.Array, tuple[Named, ...]]:
                self.engine.compiles.tracing("clip_grad_norm_", _clip_facts(grads, max_norm, norm_type))
                norm = total_norm([grad for one in grads for grad in one.values()], norm_type)
                factor = clip_factor(norm, max_norm)
                clipped = jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)
                return self.engine.constrain(norm), self.engine.keep_gradients(owners, clipped)

            return jax.jit(clip, donate_argnums=0)

        with self.engine.dtypes(any(model.wants_64bit for model, _ in targets)):
            norm, clipped = self.engine.compiles.run(
                self.function(("clip norm", max_norm, norm_type, owners), make), held
            )
        _replace_gradients(targets, clipped)
        return norm

    def clip_value(self, targets: Sequence[Target], limit: float) -> None:
        """Clamp the gradients of the targets elementwise."""
        held = tuple([self._own_gradients(model, names) for model, names in targets])
        owners = tuple([model.name for model, _ in targets])

        def make() -> Callable[..., Any]:
            def clip(grads: tuple[Named, ...]) -> tuple[Named, ...]:
                self.engine.compiles.tracing("clip_grad_value_", _clip_facts(grads, limit))
                clipped: tuple[Named, ...] = jax.tree.map(lambda grad: jnp.clip(grad, -limit, limit), grads)
                return self.engine.keep_gradients(owners, clipped)

            return jax.jit(clip, donate_argnums=0)

        with self.engine.dtypes(any(model.wants_64bit for model, _ in targets)):
            clipped = self.engine.compiles.run(self.function(("clip value", limit, owners), make), held)
        _replace_gradients(targets, clipped)

    # -- update ----------------------------------------------------------------------------------------------------------

    def update(self, optimizer: JaxOptimizer) -> None:
        """One step of an optimizer from the gradients that its model holds; nothing if it holds none."""
        engine, model = self.engine, optimizer.model
        grads = model.gradients
        if not optimizer.covers_model:
            mine = set(optimizer.names)
            grads = {name: grad for name, grad in grads.items() if name in mine}
        if not grads:
            return
        with engine.dtypes(model.wants_64bit):
            function = self.function(
                ("update", id(optimizer), optimizer.source.signature()), lambda: self._update_function(optimizer)
            )
            trained, state, scaler, skipped = engine.compiles.run(
                function,
                (optimizer.trained_leaves(), optimizer.leaves),
                grads,
                optimizer.hyperparameters(),
                engine.scaler,
                model.overflow,
            )
        self._finish_update(optimizer, trained, state, scaler, skipped)

    def _update_function(self, optimizer: JaxOptimizer) -> Callable[..., Any]:
        def update(owned: Any, grads: Named, hyper: Any, scaler: Any, is_finite: Any) -> Any:
            self.engine.compiles.tracing(
                f"update of {optimizer.model.name}",
                {"gradients": f"{len(grads)} arrays", "options": str(optimizer.source.signature())},
            )
            return apply_update(optimizer, owned, grads, hyper, scaler, is_finite)

        return jax.jit(update, donate_argnums=0)

    def _finish_update(self, optimizer: JaxOptimizer, trained: Any, state: Any, scaler: Any, skipped: Any) -> None:
        optimizer.model.set_leaves(optimizer.take_over(trained, state))
        optimizer.skipped = skipped
        self.engine.compiles.num_updates += 1
        if scaler is not None:
            self.engine.scaler = scaler
        if self.engine.planner is not None:
            self.engine.planner.updated(optimizer)


# -- traced pieces that the fused step shares ------------------------------------------------------------------------------


def apply_update(
    optimizer: JaxOptimizer, owned: Any, grads: Named, hyper: Any, scaler: Any, is_finite: jax.Array | None
) -> tuple[Any, Any, Any, Any]:
    """Traced: (parameters, state, loss scaler, whether the step was skipped) after an update with unscaled gradients."""
    engine = optimizer.engine
    leaves, state_leaves = owned
    params = dict(zip(optimizer.names, leaves, strict=True))
    state = jax.tree.unflatten(optimizer.treedef, state_leaves)
    grads = {name: grad.astype(params[name].dtype) for name, grad in grads.items()}
    new_params, new_state = optimizer.source.update(params, grads, state, hyper)
    new_leaves = tuple([new_params[name].astype(params[name].dtype) for name in optimizer.names])
    new_state_leaves, treedef = jax.tree.flatten(new_state)
    if treedef != optimizer.treedef:
        raise UnsupportedError(
            "the optimizer's update changed the structure of its state",
            "use an optimizer whose state keeps its structure",
        )
    updated = (new_leaves, tuple(new_state_leaves))
    skipped = None
    if scaler is not None:
        is_finite = all_finite(grads) if is_finite is None else is_finite
        updated = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, (leaves, tuple(state_leaves)))
        scaling: Any = engine.plan.precision.loss_scaling
        scaler = next_scaler(scaler, is_finite, scaling)
        skipped = ~is_finite
    new_leaves = engine.keep(updated[0], map(optimizer.model.full, optimizer.names))
    kept_state = engine.keep(updated[1], optimizer.owners)
    scaler, skipped = engine.constrain((scaler, skipped))
    return new_leaves, kept_state, scaler, skipped


def unscaled(grads: Named, scale: float, loss_scale: jax.Array | None) -> Named:
    """Traced: gradients of scale * loss in at least float32, from those of loss_scale * loss."""
    grads = {name: grad.astype(_gradient_dtype(grad)) for name, grad in grads.items()}
    if loss_scale is not None:
        factor = scale / loss_scale
        return {name: grad * factor.astype(grad.dtype) for name, grad in grads.items()}
    return grads if scale == 1.0 else {name: grad * jnp.asarray(scale, grad.dtype) for name, grad in grads.items()}


def total_norm(grads: Sequence[jax.Array], norm_type: float) -> jax.Array:
    """Traced: the norm of all gradients as one vector (torch.nn.utils.get_total_norm)."""
    if not grads:
        return jnp.zeros((), jnp.float32)
    if norm_type == float("inf"):
        return jnp.stack([jnp.abs(grad).max() for grad in grads]).max()
    if norm_type == 2.0:
        return jnp.sqrt(jnp.stack([jnp.square(jnp.abs(grad)).sum() for grad in grads]).sum())
    powers = jnp.stack([(jnp.abs(grad) ** norm_type).sum() for grad in grads])
    return powers.sum() ** (1.0 / norm_type)


def clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    """Traced: what gradients of this norm are multiplied by (torch.nn.utils.clip_grads_with_norm_)."""
    return jnp.minimum(max_norm / (norm + 1e-6), 1.0)


def _gradient_dtype(value: jax.Array) -> Any:
    return jnp.promote_types(value.dtype, jnp.float32)


def _forward_function(work: Work) -> Callable[..., Any]:
    def forward(params: Any, buffers: Any, base: Any, counter: Any, inputs: Any) -> Any:
        result, following = work.run(params, buffers, base, counter, inputs, None, "forward")
        return result.outputs, work.by_model(result.buffers), following

    work.functions["forward"] = jitted = jax.jit(forward)
    return jitted


def _backward_function(work: Work, scale: float) -> Callable[..., Any]:
    def backward(
        held: Any, params: Any, buffers: Any, base: Any, counter: Any, inputs: Any, scaler: Any, total: Any
    ) -> Any:
        loss_scale = None if scaler is None else scaler[0]
        added = f"{sum(map(len, held))} arrays"
        result, following = work.run(
            params,
            buffers,
            base,
            counter,
            inputs,
            loss_scale,
            "backward",
            **{"gradients added to": added, "scale": str(scale)},
        )
        if work.is_weighted:
            weight = result.outputs.pop()
            result.loss = mean_of(result.loss, weight)
            total = work.engine.constrain(total + weight)
        grads = unscaled(result.grads, scale, loss_scale)
        is_finite = None if scaler is None else work.engine.constrain(all_finite(grads))
        per_model = tuple(
            {name: have[name] + grad if name in have else grad for name, grad in new.items()}
            for have, new in zip(held, work.by_model(grads), strict=True)
        )
        per_model = work.engine.keep_gradients([model.name for model in work.models], per_model)
        return result.loss, result.outputs, per_model, work.by_model(result.buffers), following, is_finite, total

    work.functions[scale] = jitted = jax.jit(backward, donate_argnums=0)
    return jitted


def _clip_facts(grads: tuple[Named, ...], *limits: float) -> dict[str, str]:
    return {"limit": ", ".join(map(str, limits)), "gradients": f"{sum(map(len, grads))} arrays"}


def _copies(grads: Named) -> Named:
    return {name: jnp.copy(grad) for name, grad in grads.items()}


def _replace_gradients(targets: Sequence[Target], clipped: Sequence[Mapping[str, Any]]) -> None:
    for (model, _), new in zip(targets, clipped, strict=True):
        model.gradients = {**model.gradients, **new}
        model.gradients_are_shared = False
