"""optax transformations and nnx.Optimizer as update rules over named parameters; schedules inside them need nothing more."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError
from polyaccel.prepared import OptimizerHandle
from polyaccel.protocols import ArraySpec
from polyaccel_jax.dialect.functional import Named
from polyaccel_jax.dialect.host_arrays import check_arrays, spec_of, with_keys
from polyaccel_jax.dialect.nnx_modules import NnxSource


class OptaxSource:
    """An update rule: the transformation sees the parameters in the model's own structure, so masks and labels mean the same."""

    def __init__(self, optimizer: Any, model: Any) -> None:
        self.optimizer = optimizer
        self.model = model
        self.handle: Any = None
        self._source: Any = model.source
        is_nnx = isinstance(optimizer, nnx.Optimizer)
        self.transformation: optax.GradientTransformation = optimizer.tx if is_nnx else optimizer
        if is_nnx and not isinstance(self._source, NnxSource):
            raise PrepareError(
                f"an nnx.Optimizer cannot train {type(self._source.module).__name__}, which is no nnx module",
                "prepare the optax transformation itself",
            )
        self._names = self._source.select(optimizer.wrt) if is_nnx else tuple(model.params)
        if not self._names:
            raise PrepareError("the optimizer's wrt filter selects no variable of the model", "use wrt=nnx.Param")
        if is_nnx:
            self._check_belongs()

    def _check_belongs(self) -> None:
        own = jax.eval_shape(
            self.transformation.init, self._source.pack({n: self.model.params[n] for n in self._names})
        )
        shapes = [leaf.shape for leaf in jax.tree.leaves(own)]
        given = [jnp.shape(leaf) for leaf in jax.tree.leaves(nnx.as_pure(self.optimizer.opt_state))]
        if shapes != given:
            raise PrepareError(
                f"the nnx.Optimizer was made for another model than {type(self._source.module).__name__}: its state does not fit",
                "make it of the model that is prepared with it: nnx.Optimizer(model, tx, wrt=nnx.Param)",
            )

    def names(self) -> tuple[str, ...]:
        """The parameters that it updates."""
        return self._names

    def init(self, params: Named) -> Any:
        """The state to start from: that of an nnx.Optimizer is continued."""
        fresh = self.transformation.init(self._source.pack(params))
        if not isinstance(self.optimizer, nnx.Optimizer):
            return fresh
        held = jax.tree.leaves(nnx.as_pure(self.optimizer.opt_state))
        return jax.tree.unflatten(jax.tree.structure(fresh), held)

    def hyperparameters(self) -> Any:
        """None: optax keeps them inside the transformation, or in its state."""
        return ()

    def signature(self) -> Hashable:
        """One transformation never changes."""
        return "optax"

    def update(self, params: Named, grads: Named, state: Any, hyper: Any) -> tuple[Named, Any]:
        """Traced: one update. A parameter that the loss does not reach has a gradient of zero, as in optax."""
        complete = {name: grads[name] if name in grads else jnp.zeros_like(params[name]) for name in self._names}
        tree = self._source.pack(params)
        updates, state = self.transformation.update(self._source.pack(complete), state, tree)
        return self._source.unpack(optax.apply_updates(tree, updates)), state

    def state_names(self, state: Any) -> list[str]:
        """Of every leaf of `state`, in the order of `jax.tree.leaves`, a name that is the same on every engine.

        What belongs to a parameter is `<parameter>.<its place in the transformation's state>` (`head.kernel.0/mu`); what belongs
        to none is its place alone (`0/count`). Raises CheckpointError where two leaves would share a name.
        """
        packed = self._source.pack(dict(zip(self._names, self._names, strict=True)))
        owners = {_parts(path): name for path, name in jax.tree_util.tree_flatten_with_path(packed)[0]}
        names = []
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
            parts = _parts(path)
            # A state that mirrors the parameters repeats their paths; a masked one has the paths of some of them.
            cut = next((start for start in range(len(parts)) if parts[start:] in owners), None)
            place = "/".join(parts[:cut]).replace(".", "/") or "state"
            names.append(place if cut is None else f"{owners[parts[cut:]]}.{place}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(
                f"two parts of the optimizer's state would both be saved as {twice!r}",
                "name the parts of the transformation's state without dots and slashes",
            )
        return names

    def saved(self, state: Any) -> dict[str, jax.Array]:
        """All of it, by `state_names`."""
        return dict(zip(self.state_names(state), jax.tree.leaves(state), strict=True))

    def parameter_names(self) -> None:
        """None: optax keeps trees, which have no order of their own."""

    def check(self, specs: Mapping[str, ArraySpec], state: Any) -> None:
        """Raises CheckpointError for the state of another transformation or model."""
        wanted = {name: spec_of(leaf) for name, leaf in self.saved(state).items()}
        check_arrays("this optax transformation", wanted, specs)

    def restored(self, arrays: Mapping[str, Any], state: Any) -> Any:
        """The state of host arrays by `state_names`."""
        leaves = [with_keys(arrays[name], leaf) for name, leaf in self.saved(state).items()]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def attach(self, handle: Any) -> None:
        """Take the handle that owns the state from now on."""
        self.handle = handle
        self._source.train(self._names)


class PreparedOptax(OptimizerHandle):
    """A prepared optax transformation or nnx.Optimizer: `step()` after backward, then `zero_grad()`."""

    def __init__(self, source: OptaxSource, optimizer: Any) -> None:
        self._polyaccel_optimizer = optimizer
        self._source = source

    def step(self, closure: None = None) -> None:
        """Update the model from its accumulated gradients; does nothing while gradients accumulate."""
        if closure is not None:
            raise UnsupportedError(
                "step(closure) calls the loss several times in one step",
                "call accelerator.backward(loss_fn, model, batch), then optimizer.step()",
            )
        if self._is_syncing:
            self._told_overflow = None
            self._polyaccel_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; does nothing while gradients accumulate."""
        if self._is_syncing:
            self._polyaccel_optimizer.zero_grad(set_to_none)

    @property
    def _is_syncing(self) -> bool:
        state = self._polyaccel_optimizer.engine.gradient_state
        return state is None or state.sync_gradients

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing because a gradient was not finite (fp16)."""
        told = self._told_overflow
        return bool(self._polyaccel_optimizer.step_was_skipped) if told is None else told

    @property
    def opt_state(self) -> Any:
        """The optax state, copied."""
        return jax.tree.map(jnp.copy, self._polyaccel_optimizer.state)

    @opt_state.setter
    def opt_state(self, value: Any) -> None:
        self._polyaccel_optimizer.state = value

    def unwrap(self) -> Any:
        """The user's own optimizer; an nnx.Optimizer gets the current state first."""
        optimizer = self._source.optimizer
        if isinstance(optimizer, nnx.Optimizer):
            structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
            current = jax.tree.unflatten(structure, jax.tree.leaves(self.opt_state))
            nnx.update(optimizer.opt_state, nnx.state(current))
        return optimizer


def _parts(path: Any) -> tuple[str, ...]:
    return tuple([jax.tree_util.keystr((key,), simple=True) for key in path])
