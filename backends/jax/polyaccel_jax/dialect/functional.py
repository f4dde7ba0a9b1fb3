"""A flax loss function as a program: models become arguments, and what user code gets inside is a live module made of tracers."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec, LossCall, ProgramModel, ProgramResult, ShardCall
from polyaccel.weighting import named_weight

Named = dict[str, jax.Array]


class FlaxSource(Protocol):
    """What the two kinds of flax modules have in common; a ModelSource that can also rebuild its module inside a trace."""

    wants_64bit: bool
    trained: tuple[str, ...] | None  # names that prepared optimizers update; None: no optimizer was prepared

    results: dict[Hashable, Results]  # by signature of the calls whose first model this is

    @property
    def token(self) -> int:
        """A number that is another one whenever programs of this model must be made anew (mode, structure, trained names)."""
        ...

    def rebuild(
        self, params: Named, buffers: Named, key: jax.Array, *, folds_keys: bool, compute_dtype: Any
    ) -> tuple[Any, Callable[[], Named]]:
        """Traced: the module that user code sees, and a function that collects the buffers that it changed.

        Called, the module takes float arrays in `compute_dtype` and gives them in float32: a loss is never computed narrow.
        """
        ...

    def recomputing(self, module: Any, remat: str) -> AbstractContextManager[None]:
        """Traced: inside, calls of the blocks of a module that `rebuild` gave keep what the setting `remat` says ("full", "dots")."""
        ...

    @property
    def draws_from_key(self) -> bool:
        """Whether `rebuild` uses the key even with one replica."""
        ...


class Handle:
    """The base of what user code holds for a prepared module. `_polyaccel_model` is the engine's handle of it."""

    _polyaccel_model: Any


_live: list[dict[int, Any]] = []  # while a program is traced: id of an engine model -> the module that stands for it


@contextmanager
def _standing_for(modules: Mapping[int, Any]) -> Iterator[None]:
    _live.append(dict(modules))
    try:
        yield
    finally:
        _live.pop()


def live_module(model: Any) -> Any | None:
    """While a loss function is traced, the module of tracers that stands for a prepared model; None outside.

    Raises PrepareError for a model that the loss function reaches without taking it as an argument: it would get no gradient.
    """
    if not _live:
        return None
    module = _live[-1].get(id(model))
    if module is None:
        raise PrepareError(
            f"the loss function uses the prepared model {model.name} without taking it as an argument",
            "pass it: accelerator.backward(loss_fn, model, batch), where loss_fn(model, batch) uses its own argument",
        )
    return module


# -- calls -----------------------------------------------------------------------------------------------------------------


class FlaxCall:
    """A function of prepared models and arrays, as a ProgramCall. Numbers are traced like arrays, all other leaves are static."""

    is_global = False
    input_axes: Sequence[int | None] | None = None
    wants_64bit = False
    draw: int | None = None

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_loss: bool
    ) -> None:
        leaves, self._treedef = jax.tree.flatten((args, dict(kwargs)), is_leaf=_refuse_unprepared)
        self.function = function
        self.is_loss = is_loss
        models: list[Any] = []
        self._slots: list[tuple[str, Any]] = []
        self.inputs: Sequence[Any] = [leaf for leaf in leaves if _kind(leaf) == "input"]
        num_inputs = 0
        for leaf in leaves:
            kind = _kind(leaf)
            if kind == "model":
                model = leaf._polyaccel_model
                if model not in models:
                    models.append(model)
                self._slots.append((kind, models.index(model)))
            elif kind == "input":
                self._slots.append((kind, num_inputs))
                num_inputs += 1
            else:
                self._slots.append((kind, _hashable(leaf)))
        if not models:
            raise PrepareError(
                f"{_name(function)} was called without a prepared model",
                "pass what accelerator.prepare returned: accelerator.backward(loss_fn, model, batch)",
            )
        self.models: tuple[ProgramModel, ...] = tuple(models)
        self._local: Callable[[Any], Any] = models[0].engine.local
        self.signature: Hashable = Hashed(
            (
                function_key(function),
                is_loss,
                self._treedef,
                tuple(self._slots),
                tuple((model.name, model.source.token) for model in models),
            )
        )
        results = models[0].source.results
        self._results: Results = results.get(self.signature) or results.setdefault(self.signature, Results())

    def describe(self, inputs: Sequence[Any]) -> tuple[str, dict[str, str]]:
        """The function's name, and what its program is specialised on."""
        facts: dict[str, str] = {}
        args, kwargs = jax.tree.unflatten(self._treedef, self._slots)
        names = _parameter_names(self.function)
        named = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
        for name, value in (*named, *kwargs.items()):
            for path, (kind, found) in jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_slot):
                where = f"{name}{jax.tree_util.keystr(path)}"
                if kind == "input":
                    facts[where] = f"{inputs[found].dtype}{list(inputs[found].shape)}"
                elif kind == "static":
                    facts[where] = repr(found[1])[:60]
        for model in self.models:
            facts[f"structure and mode of {model.name}"] = f"state {model.source.token}"
        return _name(self.function).replace("<locals>.", ""), facts

    def with_inputs(self, inputs: Sequence[Any]) -> FlaxCall:
        """The same call of other arrays."""
        other = copy.copy(self)
        other.inputs = inputs
        return other

    def build(
        self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: ShardCall
    ) -> FlaxProgram:
        """The program for inputs of these specs."""
        return FlaxProgram(self, with_grads=with_grads, num_shards=num_shards, specs=specs)

    def arguments(self, modules: Sequence[Any], inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The user's arguments with these modules and arrays in their places."""
        places = {"model": modules, "input": inputs}
        leaves = [value[1] if kind == "static" else places[kind][value] for kind, value in self._slots]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = jax.tree.unflatten(self._treedef, leaves)
        return arguments

    def finish(self, loss: jax.Array | None, outputs: list[jax.Array]) -> Any:
        """The loss, (loss, auxiliary values), or the outputs of a forward pass; this process's part of each."""
        results = self._results
        structure = results.only if results.is_uniform else results.of(self.inputs)
        if structure is None:
            return self._local(loss)
        tree = jax.tree.unflatten(structure, [self._local(output) for output in outputs])
        return tree if loss is None else (self._local(loss), tree)

    def auxiliary(self, name: str, outputs: list[jax.Array]) -> Any:
        """Traced: the auxiliary value of this name among a program's outputs. Raises UnsupportedError where there is none."""
        structure = self._results.only if self._results.is_uniform else self._results.of(self.inputs)
        return named_weight(None if structure is None else (None, jax.tree.unflatten(structure, outputs)), name)

    def note_structure(self, specs: Sequence[ArraySpec], structure: Any) -> None:
        """Remember the structure of what the function returned beside the loss (None: nothing) for inputs of these specs."""
        self._results.note(specs, structure)


class Results:
    """Structures of what a function returned, by input specs: nearly always the same for all of them."""

    def __init__(self) -> None:
        self._by_shapes: dict[Hashable, Any] = {}
        self.only: Any = None
        self.is_uniform = True

    def note(self, specs: Sequence[ArraySpec], structure: Any) -> None:
        """Note the structure that a trace gave."""
        self._by_shapes[tuple(tuple(spec.shape) for spec in specs)] = structure
        self.is_uniform = all(other == structure for other in self._by_shapes.values())
        self.only = structure

    def of(self, inputs: Sequence[Any]) -> Any:
        """The structure for these inputs."""
        return self._by_shapes[tuple(tuple(np.shape(array)) for array in inputs)]


class FlaxProgram:
    """Loss and gradients (or outputs) of a FlaxCall in the plan's precision; a pure function."""

    def __init__(self, call: FlaxCall, *, with_grads: bool, num_shards: int, specs: Sequence[ArraySpec]) -> None:
        self._call = call
        self._with_grads = with_grads
        self._folds_keys = num_shards > 1
        self._sources: list[Any] = [model.source for model in call.models]
        self._prefixes = [f"{model.name}." for model in call.models]
        self._compute_dtype = jnp.dtype(call.models[0].engine.plan.precision.compute_dtype)
        self._remat: str = call.models[0].engine.plan.remat if with_grads else "none"
        self._specs = specs
        self._num_shards = num_shards
        self._batch_size = next((spec.shape[0] for spec in specs if spec.shape), None)
        self.grad_names: tuple[str, ...] = self._grad_names() if with_grads else ()
        self.output_axes: tuple[int | None, ...] = ()
        self.draws_randomly = self._folds_keys or any(source.draws_from_key for source in self._sources)
        self.writes_params = False
        if num_shards > 1:  # a replica program is cut and joined by axes that must be known before it is traced
            self._trace_abstractly(specs)

    def _grad_names(self) -> tuple[str, ...]:
        trained = any(source.trained is not None for source in self._sources)
        names: list[str] = []
        for model, prefix, source in zip(self._call.models, self._prefixes, self._sources, strict=True):
            chosen = source.trained or () if trained else tuple(model.params)
            names += [f"{prefix}{name}" for name in chosen if jnp.issubdtype(model.params[name].dtype, jnp.inexact)]
        return tuple(names)

    def _trace_abstractly(self, specs: Sequence[ArraySpec]) -> None:
        def named(values: str) -> dict[str, Any]:
            return {
                f"{prefix}{name}": jax.ShapeDtypeStruct(array.shape, array.dtype)
                for model, prefix in zip(self._call.models, self._prefixes, strict=True)
                for name, array in getattr(model, values).items()
            }

        inputs = [jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype)) for spec in specs]
        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(lambda *args: self._forward(*args)[0], named("params"), named("buffers"), key, inputs)

    def __call__(
        self, params: Named, buffers: Named, key: jax.Array, inputs: Sequence[jax.Array], loss_scale: jax.Array | None
    ) -> ProgramResult:
        if not self._with_grads:
            (loss, outputs), changed = self._forward(params, buffers, key, inputs)
            return ProgramResult(loss, outputs, {}, changed)
        frozen = {name: value for name, value in params.items() if name not in self.grad_names}

        def scaled(trained: Named) -> tuple[jax.Array, tuple[jax.Array, list[jax.Array], Named]]:
            (loss, outputs), changed = self._forward({**frozen, **trained}, buffers, key, inputs)
            assert loss is not None
            return loss if loss_scale is None else loss * loss_scale, (loss, outputs, changed)

        trained = {name: params[name] for name in self.grad_names}
        grads, (loss, outputs, changed) = jax.grad(scaled, has_aux=True)(trained)
        return ProgramResult(loss, outputs, grads, changed)

    def _forward(
        self, params: Named, buffers: Named, key: jax.Array, inputs: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array | None, list[jax.Array]], Named]:
        call = self._call
        params = narrowed(params, self._compute_dtype)
        modules, collectors = [], []
        for index, (prefix, source) in enumerate(zip(self._prefixes, self._sources, strict=True)):
            module, collect = source.rebuild(
                _without(prefix, params),
                _without(prefix, buffers),
                jax.random.fold_in(key, index),
                folds_keys=self._folds_keys,
                compute_dtype=self._compute_dtype,
            )
            modules.append(module)
            collectors.append(collect)
        args, kwargs = call.arguments(modules, inputs)
        standing = {id(model): module for model, module in zip(call.models, modules, strict=True)}
        with ExitStack() as inside:
            inside.enter_context(_standing_for(standing))
            for source, module in zip(self._sources, modules, strict=True) if self._remat != "none" else ():
                inside.enter_context(source.recomputing(module, self._remat))
            result = call.function(*args, **kwargs)
        loss, aux = _loss_and_aux(result, call.function) if call.is_loss else (None, result)
        outputs, structure = jax.tree.flatten(aux)
        call.note_structure(self._global_specs(), None if aux is _NO_AUX else structure)
        outputs = [] if aux is _NO_AUX else [self._result(value, call.function) for value in outputs]
        self.output_axes = tuple(0 if v.shape and v.shape[0] == self._batch_size else None for v in outputs)
        changed = {
            f"{prefix}{name}": value.astype(buffers[f"{prefix}{name}"].dtype)
            for prefix, collect in zip(self._prefixes, collectors, strict=True)
            for name, value in collect().items()
        }
        return (None if loss is None else loss.astype(_at_least_float32(loss)), outputs), changed

    def _global_specs(self) -> list[ArraySpec]:
        """The specs of the whole inputs, of which replicas see parts."""
        return [
            ArraySpec((spec.shape[0] * self._num_shards, *spec.shape[1:]), spec.dtype)
            if spec.shape and spec.shape[0] == self._batch_size
            else spec
            for spec in self._specs
        ]

    def _result(self, value: Any, function: Any) -> jax.Array:
        try:
            array = jnp.asarray(value)
        except TypeError:
            raise UnsupportedError(
                f"{_name(function)} returned a {type(value).__name__}: {value!r:.60}",
                "return arrays, numbers and containers of them",
            ) from None
        return jax.lax.stop_gradient(array.astype(_at_least_float32(array)))


def narrowed(tree: Any, dtype: Any) -> Any:
    """The tree with its float32 arrays in `dtype`."""
    return jax.tree.map(lambda leaf: _cast(leaf, {jnp.dtype(jnp.float32)}, dtype), tree)


def widened(tree: Any) -> Any:
    """The tree with its bfloat16 and float16 arrays in float32."""
    return jax.tree.map(lambda leaf: _cast(leaf, {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}, jnp.float32), tree)


def _cast(leaf: Any, dtypes: set[Any], dtype: Any) -> Any:
    is_meant = isinstance(leaf, jax.Array | np.ndarray) and leaf.dtype in dtypes and leaf.dtype != dtype
    return leaf.astype(dtype) if is_meant else leaf


def _parameter_names(function: Any) -> list[str]:
    try:
        return [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # some callables of C do not say
        return []


def _is_slot(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and value[0] in ("model", "input", "static")


_NO_AUX: Any = object()


def _loss_and_aux(result: Any, function: Any) -> tuple[jax.Array, Any]:
    loss, aux = result, _NO_AUX
    if isinstance(result, tuple):
        if len(result) != 2:
            raise UnsupportedError(
                f"{_name(function)} returned a tuple of {len(result)} values",
                "return the loss, or (loss, auxiliary values)",
            )
        loss, aux = result
    shape: Any = getattr(loss, "shape", None)
    dtype: Any = getattr(loss, "dtype", None)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        what = type(loss).__name__ if shape is None else f"{dtype} array of shape {shape}"
        raise UnsupportedError(
            f"{_name(function)} returned a {what} as the loss, which must be a floating scalar",
            "return the mean over the batch",
        )
    return loss, aux


def _at_least_float32(value: jax.Array) -> Any:
    narrow = value.dtype in (jnp.bfloat16, jnp.float16)
    return jnp.float32 if narrow else value.dtype


def _without(prefix: str, values: Named) -> Named:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


# -- what a function and its arguments are -----------------------------------------------------------------------------------


def lower_call(call: LossCall, known: dict[Hashable, FlaxCall]) -> FlaxCall:
    """A loss function and its arguments as a program call. Raises PrepareError where no prepared model is among them.

    `known` keeps calls between steps: one that differs from an earlier one in its arrays alone is made from that.
    """
    leaves, treedef = _flatten((call.args, call.kwargs) if call.kwargs else call.args)
    inputs: list[Any] = []
    parts: list[Any] = [call.function, treedef]
    for leaf in leaves:
        kind = _kind(leaf)
        if kind == "input":
            inputs.append(leaf)
        elif kind == "model":
            parts.append((leaf, leaf._polyaccel_model.source.token))
        else:
            parts.append((type(leaf), leaf))
    try:
        key = tuple(parts)
        found = known.get(key)
    except TypeError:  # something that cannot be hashed: a new call says what
        return FlaxCall(call.function, call.args, call.kwargs, is_loss=True)
    if found is None:
        found = FlaxCall(call.function, call.args, call.kwargs, is_loss=True)
        if len(known) >= _MAX_KNOWN:  # a function that is made anew in every round never comes back
            known.clear()
        known[key] = found
    return found.with_inputs(inputs)


_MAX_KNOWN = 256
_flatten = jax.tree_util.default_registry.flatten  # what jax.tree.flatten calls, without its wrapper
_kinds: dict[type, str] = {bool: "static", int: "input", float: "input", complex: "input"}


def _kind(leaf: Any) -> str:
    """What a leaf of the arguments is: a prepared "model", an "input" (an array or a number), or "static"."""
    found = _kinds.get(type(leaf))
    if found is not None:
        return found
    if isinstance(leaf, np.ndarray | np.generic):
        return "input" if leaf.dtype.kind in "biufcV" else "static"
    kind = (
        "model"
        if isinstance(leaf, Handle)
        else "input"
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        else "static"
    )
    _kinds[type(leaf)] = kind
    return kind


def _refuse_unprepared(value: Any) -> bool:
    if any(kind.__module__.partition(".")[0] == "flax" and kind.__name__ == "Module" for kind in type(value).__mro__):
        raise PrepareError(
            f"the loss function was given a {type(value).__name__} that is not prepared",
            "pass the model that accelerator.prepare returned",
        )
    return False


class Hashed:
    """A tuple that computes its hash once."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: tuple[Hashable, ...]) -> None:
        self.value = value
        self._hash = hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Hashed) and self.value == other.value)

    def __hash__(self) -> int:
        return self._hash


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        raise UnsupportedError(
            f"an argument of the loss function holds a {type(leaf).__name__}, which is neither an array nor hashable",
            "pass arrays, numbers, strings and containers of them",
        ) from None
    return (type(leaf), leaf)  # True and 1 are equal, and are not the same program


def function_key(function: Callable[..., Any]) -> Hashable:
    """Equal for functions that do the same: the same object, or the same code with the same captured values.

    A lambda written in the loop is a new object in every round; without this each round would compile.
    """
    if isinstance(function, functools.partial):
        captured = (*function.args, *function.keywords.items())
        return ("partial", function_key(function.func), tuple(_captured(value) for value in captured))
    if isinstance(function, types.MethodType):
        return ("method", function.__func__, Same(function.__self__))
    if isinstance(function, types.FunctionType):
        values = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return (function.__code__, Same(function.__globals__), tuple(_captured(value) for value in values))
    return Same(function)


class Same:
    """Equal to another one of the very same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _captured(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return (type(value), value)
    if isinstance(value, tuple):
        return tuple(_captured(item) for item in value)
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return function_key(value)
    return Same(value)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
