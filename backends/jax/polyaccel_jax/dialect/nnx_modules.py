"""flax.nnx modules: split once into named arrays, rebuilt from tracers inside programs, written back only when user code looks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.sharding.blocks import blocks_of_names
from polyaccel.sharding.plan import ModelHints
from polyaccel_jax.dialect.creation import is_made_here
from polyaccel_jax.dialect.functional import FlaxCall, Handle, Named, Results, live_module, narrowed, widened
from polyaccel_jax.dialect.partitioning import hints_of_variables
from polyaccel_jax.dialect.recomputed_blocks import policy_of, recomputed_nnx


class NnxSource:
    """A module's graph and variables. Params are `nnx.Param` variables (and what an optimizer's `wrt` adds), all others buffers."""

    wants_64bit = False
    transient: frozenset[str] = frozenset()
    draws_from_key = False  # modules draw from their own nnx.Rngs

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        self.trained: tuple[str, ...] | None = None
        self.results: dict[Hashable, Results] = {}
        self.model: Any = None
        self._tokens: dict[Any, int] = {}
        self._token = -1
        self._seen: dict[str, Any] = {}  # what user code's module holds, as it was when the two last agreed
        self._version = -1
        self._is_touched = False
        self._variables: dict[str, Any] = {}
        self._paths: dict[str, tuple[Any, ...]] = {}
        self._read_module()

    # -- ModelSource -----------------------------------------------------------------------------------------------------

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, buffers) by dotted path."""
        params = {name: v.get_value() for name, v in self._variables.items() if isinstance(v, nnx.Param)}
        buffers = {name: v.get_value() for name, v in self._variables.items() if name not in params}
        return params, buffers

    def specs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same: nothing is computed to read them."""
        return self.read()

    def hints(self) -> ModelHints:
        """The partitioning metadata of its variables."""
        return hints_of_variables(self._variables)

    def attach(self, model: Any) -> None:
        """Take the handle that owns the values from now on."""
        self.model = model
        self._version = model.version
        if is_made_here(self.module):
            self._let_go()

    def settle(self, *, for_writing: bool) -> None:
        """Take over what user code wrote to its module."""
        if self._is_touched:
            self._absorb()

    # -- programs --------------------------------------------------------------------------------------------------------

    @property
    def token(self) -> int:
        """Which structure, mode and trained names programs are made for."""
        if self._is_touched:
            self._absorb()
        return self._token

    def rebuild(
        self, params: Named, buffers: Named, key: jax.Array, *, folds_keys: bool, compute_dtype: Any
    ) -> tuple[nnx.Module, Callable[[], Named]]:
        """Traced: a module of these arrays. With several replicas each one's random keys are folded with its own `key`."""
        given = {**params, **buffers}
        if folds_keys:
            fold = jax.random.bits(key)
            for name, variable in self._variables.items():
                if isinstance(variable, nnx.RngKey):
                    given[name] = jax.random.fold_in(given[name], fold)
        flat = [(path, self._variables[name].replace(given[name])) for name, path in self._paths.items()]
        module = nnx.merge(self._graph, nnx.from_flat_state(flat))

        def changed() -> Named:
            _, state = nnx.split(module)
            found = {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
            if set(found) != set(given):
                new = sorted(set(found) ^ set(given))
                raise UnsupportedError(
                    f"the loss function added or removed variables of {type(self.module).__name__}: {', '.join(new)}",
                    "create all variables before prepare",
                )
            return {name: found[name] for name in buffers if found[name] is not given[name]}

        if compute_dtype == jnp.float32:
            return module, changed
        for _, part in nnx.iter_modules(module):
            # nnx promotes to the float32 of the running statistics; from there on the whole model would compute in float32.
            if isinstance(part, nnx.BatchNorm) and part.dtype is None:
                part.dtype = compute_dtype
        return MixedPrecision(module, compute_dtype), changed

    def recomputing(self, module: Any, remat: str) -> AbstractContextManager[None]:
        """Traced: inside, the blocks of a module that `rebuild` gave are computed again by backward passes."""
        inner = module.inner if isinstance(module, MixedPrecision) else module
        blocks = blocks_of_names(name for name, v in self._variables.items() if isinstance(v, nnx.Param))
        return recomputed_nnx(inner, blocks, policy_of(remat))

    # -- optimizers ------------------------------------------------------------------------------------------------------

    def select(self, wrt: Any) -> tuple[str, ...]:
        """Names of the variables that an nnx filter selects, buffers that it trains included."""
        matches = nnx.filterlib.to_predicate(wrt)
        names = tuple(name for name, path in self._paths.items() if matches(path, self._variables[name]))
        extra = [name for name in names if name not in self.model.positions]
        if extra:
            self.model.move_to_params(extra)
        return names

    def train(self, names: tuple[str, ...]) -> None:
        """Note that an optimizer updates these parameters: only trained ones get gradients."""
        self.trained = tuple(dict.fromkeys((*(self.trained or ()), *names)))
        self._renew_token()

    def pack(self, values: Named) -> Any:
        """Named arrays as the pytree that optax transformations of nnx models see."""
        return nnx.from_flat_state([(self._paths[name], value) for name, value in values.items()])

    def unpack(self, tree: Any) -> Named:
        """The named arrays of such a pytree."""
        return {_dotted(path): value for path, value in nnx.to_flat_state(tree)}

    # -- the user's module -----------------------------------------------------------------------------------------------

    def current(self) -> nnx.Module:
        """The user's module with current values. What user code changes in it is taken over before the next program."""
        if self._is_touched:
            self._absorb()
        if self._version != self.model.version:
            values = {**self.model.params, **self.model.buffer_arrays}
            # Copies: the next update deletes the arrays that it is given.
            self._seen = {name: jnp.copy(value) for name, value in values.items()}
            self._show(self._seen)
            self._version = self.model.version
        self._is_touched = True
        return self.module

    def _let_go(self) -> None:
        """Hold shapes instead of the values that the model has a copy of, until user code looks: beside it they would lie all along."""
        self._seen = {
            name: jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype)
            for name, variable in self._variables.items()
        }
        self._show(self._seen)
        self._read_module()
        self._version = -1

    def _show(self, values: Mapping[str, Any]) -> None:
        """Let the user's module hold these values."""
        flat = [(path, self._variables[name].replace(values[name])) for name, path in self._paths.items()]
        nnx.update(self.module, nnx.from_flat_state(flat))

    def set_mode(self, *, is_training: bool, attributes: dict[str, Any]) -> None:
        """`module.train()` or `module.eval()`."""
        if is_training:
            self.module.train(**attributes)
        else:
            self.module.eval(**attributes)
        self._graph, _ = nnx.split(self.module)
        self._renew_token()

    def _absorb(self) -> None:
        """Take over what user code changed in the module since it got it."""
        self._is_touched = False
        self._read_module()
        values = {name: variable.get_value() for name, variable in self._variables.items()}
        changed = {name: value for name, value in values.items() if self._seen.get(name) is not value}
        if changed:
            self.model.assign(changed)
            self._seen = values
            self._version = self.model.version

    def _read_module(self) -> None:
        self._graph, state = nnx.split(self.module)
        variables: dict[str, Any] = {}
        paths: dict[str, tuple[Any, ...]] = {}
        for path, variable in nnx.to_flat_state(state):
            name = _dotted(path)
            value = variable.get_value()
            if not isinstance(value, jax.Array | jax.ShapeDtypeStruct) or variable.get_metadata().get("ref"):
                raise PrepareError(
                    f"variable {name!r} of {type(self.module).__name__} holds a {type(value).__name__}, not a jax array",
                    "keep jax arrays in nnx variables",
                )
            variables[name], paths[name] = variable, path
        if self.model is not None and set(variables) != set(self._variables):
            raise PrepareError(
                f"variables of {type(self.module).__name__} were added or removed after prepare: "
                f"{', '.join(sorted(set(variables) ^ set(self._variables)))}",
                "create all variables before prepare",
            )
        self._variables, self._paths = variables, paths
        if not self._seen:
            self._seen = {name: variable.get_value() for name, variable in variables.items()}
        self._renew_token()

    def _renew_token(self) -> None:
        self._token = self._tokens.setdefault((self._graph, self.trained), len(self._tokens))


class MixedPrecision(nnx.Module):
    """A module whose calls (and those of its methods) take float arrays in a narrow dtype and give them in float32."""

    def __init__(self, inner: nnx.Module, dtype: Any) -> None:
        self.inner = inner
        self.dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the inner module."""
        return self._call(self.inner, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "dtype"):
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if isinstance(found, MethodType) and found.__self__ is self.inner:
            return lambda *args, **kwargs: self._call(found, args, kwargs)
        return found

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = narrowed((args, kwargs), self.dtype)
        return widened(function(*args, **kwargs))


class PreparedNnx(Handle):
    """A prepared nnx module. Calling it runs its forward pass on the engine; inside a loss function the argument is a real module.

    Attributes and methods are those of the user's module, brought up to date first; values set there count from the next
    step on. `train()` and `eval()` switch modes as nnx does.
    """

    def __init__(self, source: NnxSource, model: Any) -> None:
        object.__setattr__(self, "_polyaccel_model", model)
        object.__setattr__(self, "_source", source)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs in float32 or wider, batch cut over the devices."""
        module = live_module(self._polyaccel_model)
        if module is not None:
            return module(*args, **kwargs)
        call = FlaxCall(apply_module, (self, *args), kwargs, is_loss=False)
        return self._polyaccel_model.engine.run_forward(call)

    def train(self, **attributes: Any) -> None:
        """Training mode: dropout is on, BatchNorm uses and updates batch statistics."""
        self._source.set_mode(is_training=True, attributes=attributes)

    def eval(self, **attributes: Any) -> None:
        """Evaluation mode: dropout is off, BatchNorm uses its running statistics."""
        self._source.set_mode(is_training=False, attributes=attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_source", "_polyaccel_model"):
            raise AttributeError(name)
        module = live_module(self._polyaccel_model)
        return getattr(self._source.current() if module is None else module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._source.current(), name, value)

    def __repr__(self) -> str:
        return f"PreparedNnx({type(self._source.module).__name__})"


def apply_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a module."""
    return module(*args, **kwargs)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
