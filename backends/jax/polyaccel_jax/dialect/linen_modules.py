"""flax.linen modules, prepared as `module.bind(variables)`: pure already, so programs only bring variables, keys and mutability."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen, traverse_util

from polyaccel.errors import PrepareError
from polyaccel.sharding.blocks import blocks_of_names
from polyaccel.sharding.plan import ModelHints
from polyaccel_jax.dialect.functional import FlaxCall, Handle, Named, Results, live_module, narrowed, widened
from polyaccel_jax.dialect.partitioning import hints_of_boxes
from polyaccel_jax.dialect.recomputed_blocks import LinenBlocks, policy_of, warn_uncalled

_PARAMS = "params"


class LinenSource:
    """A module and its variables. Params are the collection `params` by dotted path, all other collections are buffers."""

    wants_64bit = False
    transient: frozenset[str] = frozenset()
    draws_from_key = True

    def __init__(self, module: linen.Module) -> None:
        if module.scope is None:
            raise PrepareError(
                f"{type(module).__name__} is a linen module without variables",
                "initialize it and bind them: accelerator.prepare(module.bind(module.init(key, example)))",
            )
        self.module, variables = module.unbind()
        self.trained: tuple[str, ...] | None = None
        self.results: dict[Hashable, Results] = {}
        self.model: Any = None
        self.is_training = True
        self._tokens: dict[Any, int] = {}
        self._token = 0
        flat = {path: jnp.asarray(v) for path, v in traverse_util.flatten_dict(_plain(variables)).items()}
        # "params" needs no prefix; the name of another collection stays in front of its variables.
        self._paths = {".".join(path[1:] if path[0] == _PARAMS else path): path for path in flat}
        self._initial = {name: flat[path] for name, path in self._paths.items()}
        boxes = traverse_util.flatten_dict(core.unfreeze(dict(variables)).get(_PARAMS, {}))
        self._hints = hints_of_boxes({".".join(path): box for path, box in boxes.items()})
        self._collections = sorted({path[0] for path in flat} - {_PARAMS})

    # -- ModelSource -----------------------------------------------------------------------------------------------------

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, buffers) by dotted path."""
        params = {name: value for name, value in self._initial.items() if self._paths[name][0] == _PARAMS}
        return params, {name: value for name, value in self._initial.items() if name not in params}

    def specs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same: nothing is computed to read them."""
        return self.read()

    def hints(self) -> ModelHints:
        """The partitioning metadata of its variables."""
        return self._hints

    def attach(self, model: Any) -> None:
        """Take the handle that owns the values from now on."""
        self.model = model
        self._initial = {}

    def settle(self, *, for_writing: bool) -> None:
        """Nothing: what user code gets are copies."""

    # -- programs --------------------------------------------------------------------------------------------------------

    @property
    def token(self) -> int:
        """Which mode and trained names programs are made for."""
        return self._token

    def rebuild(
        self, params: Named, buffers: Named, key: jax.Array, *, folds_keys: bool, compute_dtype: Any
    ) -> tuple[Any, Callable[[], Named]]:
        """Traced: a bound module of these variables that has keys for every stream and may change every collection."""
        bound = BoundLinen(self, {**params, **buffers}, key, compute_dtype)

        def changed() -> Named:
            return {name: bound.values[name] for name in buffers if bound.values[name] is not buffers[name]}

        return bound, changed

    @contextmanager
    def recomputing(self, module: BoundLinen, remat: str) -> Iterator[None]:
        """Traced: inside, the blocks of what `rebuild` gave are computed again by backward passes."""
        blocks = blocks_of_names(name for name, path in self._paths.items() if path[0] == _PARAMS)
        module.interceptor = LinenBlocks(blocks, policy_of(remat))
        yield
        if not module.interceptor.is_called:
            warn_uncalled(self.module)

    def variables(self, values: Named) -> dict[str, Any]:
        """Named values as linen's nested variables."""
        nested: dict[str, Any] = traverse_util.unflatten_dict(
            {self._paths[name]: value for name, value in values.items()}
        )
        return nested

    def names_of(self, variables: Any) -> Named:
        """The named values of (a part of) linen's variables that the model has; others, such as sown ones, are left out."""
        known = {path: name for name, path in self._paths.items()}
        flat = traverse_util.flatten_dict(_plain(variables))
        return {known[path]: value for path, value in flat.items() if path in known}

    def apply(self, values: Named, key: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Named]:
        """Traced: the module's output, and the buffers that it changed."""
        # Written even in evaluation, where a module asked to update its statistics would otherwise raise, and then dropped.
        output, written = self.module.apply(
            self.variables(values), *args, rngs={_PARAMS: key}, mutable=self._collections or ["intermediates"], **kwargs
        )
        return output, self.names_of(written) if self.is_training else {}

    # -- optimizers ------------------------------------------------------------------------------------------------------

    def train(self, names: tuple[str, ...]) -> None:
        """Note that an optimizer updates these parameters: only trained ones get gradients."""
        self.trained = tuple(dict.fromkeys((*(self.trained or ()), *names)))
        self._renew_token()

    def pack(self, values: Named) -> Any:
        """Named arrays as the nested params that optax transformations of linen models see."""
        return traverse_util.unflatten_dict({self._paths[name][1:]: value for name, value in values.items()})

    def unpack(self, tree: Any) -> Named:
        """The named arrays of such a pytree."""
        return {".".join(path): value for path, value in traverse_util.flatten_dict(tree).items()}

    # -- the user's module -----------------------------------------------------------------------------------------------

    def current(self) -> Any:
        """The module bound to copies of the current variables."""
        values = {name: jnp.copy(value) for name, value in {**self.model.params, **self.model.buffers}.items()}
        return self.module.bind(self.variables(values))

    def set_mode(self, *, is_training: bool) -> None:
        """Whether variables may change."""
        self.is_training = is_training
        self._renew_token()

    def _renew_token(self) -> None:
        self._token = self._tokens.setdefault((self.is_training, self.trained), len(self._tokens))


class BoundLinen:
    """What a loss function gets: call it like the module. Changed variables and random keys are taken care of.

    Every call draws other random numbers, and sees the variables that the calls before it changed.
    """

    def __init__(self, source: LinenSource, values: Named, key: jax.Array, compute_dtype: Any) -> None:
        self.values = values
        self._compute_dtype = compute_dtype
        self._source = source
        self._key = key
        self._num_calls = 0
        self.interceptor: LinenBlocks | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` with these variables; `method=` works as there."""
        key = jax.random.fold_in(self._key, self._num_calls)
        self._num_calls += 1
        args, kwargs = narrowed((args, kwargs), self._compute_dtype)
        with linen.intercept_methods(self.interceptor) if self.interceptor else nullcontext():
            output, changed = self._source.apply(self.values, key, args, kwargs)
        self.values = {**self.values, **changed}
        return widened(output) if self._compute_dtype != jnp.float32 else output

    @property
    def variables(self) -> dict[str, Any]:
        """The variables, nested by collection."""
        return self._source.variables(self.values)

    @property
    def module(self) -> linen.Module:
        """The unbound module."""
        return self._source.module


class PreparedLinen(Handle):
    """A prepared linen module. Calling it runs its forward pass on the engine; inside a loss function the argument is its twin.

    linen modules take their mode as an argument of the call, so `eval()` changes one thing: variables such as running
    statistics are not updated.
    """

    def __init__(self, source: LinenSource, model: Any) -> None:
        self._source = source
        self._polyaccel_model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs in float32 or wider, batch cut over the devices; keys of every stream are given."""
        bound = live_module(self._polyaccel_model)
        if bound is not None:
            return bound(*args, **kwargs)
        call = FlaxCall(_apply, (self, *args), kwargs, is_loss=False)
        return self._polyaccel_model.engine.run_forward(call)

    def train(self) -> None:
        """Variables are updated by the calls that change them."""
        self._source.set_mode(is_training=True)

    def eval(self) -> None:
        """Variables stay as they are."""
        self._source.set_mode(is_training=False)

    @property
    def variables(self) -> dict[str, Any]:
        """The current variables, nested by collection, copied."""
        bound = live_module(self._polyaccel_model)
        found: dict[str, Any] = self._source.current().variables if bound is None else bound.variables
        return found

    @property
    def module(self) -> linen.Module:
        """The unbound module."""
        return self._source.module

    def __repr__(self) -> str:
        return f"PreparedLinen({self._source.module!r})"


def _apply(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _plain(variables: Any) -> dict[str, Any]:
    """Nested dicts of plain arrays: boxed (partitioned) leaves and frozen dicts are opened."""
    opened: dict[str, Any] = linen.unbox(variables)
    return {name: _plain(value) if hasattr(value, "items") else value for name, value in opened.items()}
