"""What prepare hands out: a model that owns its arrays, and an optimizer that owns the state of its update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import PrepareError
from polyaccel.protocols import ModelSource, OptimizerSource
from polyaccel_jax.agreed import agreed

if TYPE_CHECKING:
    from polyaccel_jax.engine import JaxEngine


class JaxModel:
    """A model's arrays on the mesh. An update replaces them and deletes the old ones: take what you need anew after each.

    `leaves` are the parameters in the order of `names`: steps pass them on as they are, and dicts are made only when asked for.
    """

    def __init__(self, engine: JaxEngine, name: str, source: ModelSource, *, partitioning: str) -> None:
        planner = engine.planner
        params, buffers = source.read() if planner is None else source.specs()
        self.engine: Any = engine
        self.name = name
        self.source: Any = source
        self.partitioning = partitioning
        self.wants_64bit = source.wants_64bit
        self.version = 0
        self.names: tuple[str, ...] = tuple(params)
        self.positions = {key: index for index, key in enumerate(self.names)}
        with engine.dtypes(self.wants_64bit):
            engine.mesh.lay_out(name, source.specs()[0], source.hints())
            names = [self.full(key) for key in params]
            self.leaves: tuple[jax.Array, ...] = tuple(engine.mesh.keep(self._alike(params.values()), names))
            arrays = engine.mesh.replicate(list(self._alike(buffers.values())))  # few and small
        self.buffer_arrays: dict[str, jax.Array] = dict(zip(buffers, arrays, strict=True))
        self.gradients: dict[str, jax.Array] = {}
        self.gradients_are_shared = False
        self.overflow: jax.Array | None = None  # fp16: whether a gradient was not finite, noted before any clipping
        self._params: dict[str, jax.Array] | None = None
        if planner is not None:
            planner.models.append(self)

    def _alike(self, values: Iterable[Any]) -> Iterable[Any]:
        several = self.engine.mesh.num_processes > 1
        return agreed(self.engine.collectives, type(self.source.module).__name__, values) if several else values

    def full(self, name: str) -> str:
        """The name of one of its parameters in programs and on the mesh."""
        return f"{self.name}.{name}"

    # -- what the protocol shows -----------------------------------------------------------------------------------------

    @property
    def params(self) -> dict[str, jax.Array]:
        """The parameters by name; valid until the next update."""
        if self._params is None:
            self._params = dict(zip(self.names, self.leaves, strict=True))
        return self._params

    @params.setter
    def params(self, values: dict[str, jax.Array]) -> None:
        self.set_leaves(tuple(values[name] for name in self.names))

    @property
    def buffers(self) -> dict[str, jax.Array]:
        """The buffers by name; valid until the next change."""
        return dict(self.buffer_arrays)

    @buffers.setter
    def buffers(self, values: dict[str, jax.Array]) -> None:
        self.buffer_arrays = dict(values)
        self.version += 1

    @property
    def grads(self) -> dict[str, jax.Array]:
        """The accumulated gradients by name, in float32; empty after zero_grad."""
        self.gradients_are_shared = True  # whoever holds one must not see it deleted by the next accumulation
        return self.gradients

    @grads.setter
    def grads(self, values: Mapping[str, jax.Array]) -> None:
        self.gradients = dict(values)
        self.gradients_are_shared = True

    def set_gradients(self, values: Mapping[str, jax.Array]) -> None:
        """Replace the gradients of these parameters."""
        self.gradients.update(values)

    def zero_grad(self, names: Sequence[str] | None = None) -> None:
        """Drop the gradients of these parameters (None: of all)."""
        if names is None or len(names) == len(self.names):
            self.gradients = {}
        else:
            dropped = set(names)
            self.gradients = {name: grad for name, grad in self.gradients.items() if name not in dropped}
        if not self.gradients:
            self.gradients_are_shared = False
            self.overflow = None

    def assign(self, values: Mapping[str, Any]) -> None:
        """Replace parameters and buffers by arrays of the same shapes: copied, placed, cast to the dtype they have."""
        current = {**self.params, **self.buffer_arrays}
        for name, value in values.items():
            if name not in current:
                raise PrepareError(f"the model has no parameter or buffer {name!r}", f"it has: {', '.join(current)}")
            if tuple(np.shape(value)) != current[name].shape:
                raise PrepareError(
                    f"{name} has shape {current[name].shape}, and the new value has shape {tuple(np.shape(value))}",
                    "give a value of the same shape",
                )
        self.take({name: self.placed(name, value) for name, value in values.items()})

    def placed(self, name: str, value: Any) -> jax.Array:
        """A copy of a new value for a parameter or buffer, where and in the dtype that it is kept; the model does not change."""
        mesh = self.engine.mesh
        with self.engine.dtypes(self.wants_64bit):
            if name in self.positions:
                copies = mesh.keep([_cast(value, self.params[name])], [self.full(name)])
            else:
                copies = mesh.replicate([_cast(value, self.buffer_arrays[name])])
        copy: jax.Array = copies[0]
        return copy

    def take(self, placed: Mapping[str, jax.Array]) -> None:
        """Replace parameters and buffers by what `placed` gave."""
        self.set_leaves(
            tuple(placed.get(name, leaf) for name, leaf in zip(self.names, self.leaves, strict=True)),
            {name: value for name, value in placed.items() if name in self.buffer_arrays},
        )

    # -- what programs do ------------------------------------------------------------------------------------------------

    def set_leaves(
        self, leaves: tuple[jax.Array, ...] | None, changed_buffers: Mapping[str, jax.Array] | None = None
    ) -> None:
        """Take over new parameters (None: unchanged) and the buffers that changed; a program may have written parameters among them."""
        if leaves is not None:
            self.leaves = leaves
        if changed_buffers:
            written = changed_buffers.keys() & self.positions.keys()
            if written:
                pairs = zip(self.names, self.leaves, strict=True)
                self.leaves = tuple(changed_buffers[name] if name in written else leaf for name, leaf in pairs)
            self.buffer_arrays.update({name: value for name, value in changed_buffers.items() if name not in written})
        self.forget_views()

    def forget_views(self) -> None:
        """Note that the values changed."""
        self._params = None
        self.version += 1

    def move_to_params(self, names: Iterable[str]) -> None:
        """Make parameters of buffers that an optimizer trains."""
        names = tuple(names)
        values = [self.buffer_arrays.pop(name) for name in names]
        shapes = {
            **{name: leaf.shape for name, leaf in self.params.items()},
            **dict(zip(names, [v.shape for v in values], strict=True)),
        }
        self.engine.mesh.lay_out(self.name, shapes, self.source.hints())
        moved = tuple(self.engine.mesh.keep(values, map(self.full, names)))
        self.names += names
        self.positions = {key: index for index, key in enumerate(self.names)}
        self.set_leaves(self.leaves + moved)


class JaxOptimizer:
    """An optimizer's state on the mesh, and the compiled update of its model. The state is donated to every update."""

    def __init__(self, engine: JaxEngine, source: OptimizerSource) -> None:
        from polyaccel_jax.joint import JointModel

        model: Any = source.model
        self.engine = engine
        self.source = source
        self.model: Any = JointModel(model) if isinstance(model, tuple) else model  # a JaxModel, or several as one
        model = self.model
        self.names: tuple[str, ...] = tuple(source.names())
        self.indices = tuple(model.positions[name] for name in self.names)
        self.covers_model = self.indices == tuple(range(len(model.names)))
        self.skipped: jax.Array | None = None
        params = {name: model.params[name] for name in self.names}

        def init(params: dict[str, jax.Array]) -> Any:
            # Copies: a state that starts as the parameters themselves would be donated twice.
            return jax.tree.map(jnp.copy, source.init(params))

        with engine.dtypes(model.wants_64bit):
            shapes = jax.eval_shape(init, params)
            self.owners: tuple[str | None, ...] = owners_of(shapes, {name: model.full(name) for name in self.names})
            self.treedef: Any = jax.tree.structure(shapes)
            state = engine.mesh.made(init, self.owners, params)
        leaves = jax.tree.leaves(state)
        self.leaves: tuple[jax.Array, ...] = tuple(leaves)
        self._hyper: tuple[list[Any], Any, Any] | None = None
        if engine.planner is not None:
            engine.planner.optimizers.append(self)

    @property
    def state(self) -> Any:
        """The state as the source made it; valid until the next update."""
        return jax.tree.unflatten(self.treedef, self.leaves)

    @state.setter
    def state(self, value: Any) -> None:
        leaves, treedef = jax.tree.flatten(value)
        if treedef != self.treedef:
            raise PrepareError(
                "the optimizer state has another structure than this optimizer's",
                "load the state of an equal optimizer",
            )
        with self.engine.dtypes(self.model.wants_64bit):
            cast = [_cast(leaf, old) for leaf, old in zip(leaves, self.leaves, strict=True)]
            self.leaves = tuple(self.engine.mesh.keep(cast, self.owners))

    def step(self) -> None:
        """Update the model from its accumulated gradients; parameters without one stay as they are."""
        self._end_window()
        self.engine.steps.update(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this optimizer's parameters, or with set_to_none=False make them zeros."""
        self._end_window()
        if set_to_none:
            self.model.zero_grad(self.names)
        else:
            held = [name for name in self.names if name in self.model.gradients]
            self.model.set_gradients(self.engine.steps.zeros(self.model, held))
            self.model.overflow = None

    def _end_window(self) -> None:
        if self.engine.gradient_state is not None:
            self.engine.gradient_state.window_weights = None

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing because a gradient was not finite (fp16). Waits for that step."""
        return self.skipped is not None and bool(np.asarray(self.engine.local(self.skipped)))

    def trained_leaves(self) -> tuple[jax.Array, ...]:
        """The parameters that this optimizer updates, in the order of `names`."""
        leaves = self.model.leaves
        return leaves if self.covers_model else tuple([leaves[index] for index in self.indices])

    def frozen_leaves(self) -> dict[str, jax.Array]:
        """The model's other parameters, by name."""
        if self.covers_model:
            return {}
        mine = set(self.names)
        return {name: leaf for name, leaf in self.model.params.items() if name not in mine}

    def take_over(self, trained: tuple[jax.Array, ...], state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Keep the new state; returns all leaves of the model with the updated ones in place."""
        self.leaves = state
        if self.covers_model:
            return trained
        leaves = list(self.model.leaves)
        for index, leaf in zip(self.indices, trained, strict=True):
            leaves[index] = leaf
        return tuple(leaves)

    def hyperparameters(self) -> Any:
        """The live hyperparameters as device scalars: sent again only when one of them changed."""
        tree = self.source.hyperparameters()
        if tree == ():
            return tree
        values, treedef = jax.tree.flatten(tree)
        held = self._hyper
        if held is None or held[1] != treedef or held[0] != values:
            placed = jax.tree.unflatten(treedef, self.engine.mesh.replicate(values))
            held = self._hyper = (values, treedef, placed)
        return held[2]


def owners_of(state: Any, names: Mapping[str, str]) -> tuple[str | None, ...]:
    """Of every leaf of an optimizer's state, what `names` says of the parameter whose dotted name its path contains; None for none.

    torch's states are `{parameter: {slot: array}}`, optax's repeat the tree of the parameters somewhere inside.
    """
    owners: list[str | None] = []
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        windows = (
            ".".join(parts[start:end])
            for length in range(len(parts), 0, -1)
            for start in range(len(parts) - length + 1)
            for end in (start + length,)
        )
        owners.append(next((names[window] for window in windows if window in names), None))
    return tuple(owners)


def _cast(value: Any, like: jax.Array) -> Any:
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return value
    return value.astype(like.dtype) if isinstance(value, jax.Array) else np.asarray(value).astype(like.dtype)
