"""Loss functions as program calls: `loss_fn(model, batch)` captured once per structure of its arguments and state of its models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec, LossCall
from polyaccel.weighting import named_weight

from . import scope as capturing
from .attributes import NO_EFFECTS, learn
from .calls import (
    TorchCall,
    TrainingProgram,
    batch_axes,
    batch_size_of,
    grown,
    handles,
    numpy_dtypes,
    on_all_devices,
    rebuild,
    tensor_specs,
)
from .capture import capture_training
from .descriptions import facts_of_arguments, facts_of_models, name_of, short, shown
from .exchange import placed_array, torch_dtype
from .graphs import TensorSpec
from .guards import FunctionGuard
from .halves import leaves_of_graph
from .input_gradients import receive
from .modules import ManagedModel, PreparedModule
from .packing import LEAF, Identity, Key, freeze, settle, thaw
from .shadows import Modes, OutSpec, freeze_result, infer
from .tensors import ArrayCell, DeviceParameter, DeviceTensor, host_copy

if TYPE_CHECKING:
    from .tape import Recorder

_WARN_AFTER = 8  # captures of one function before the user is told what makes them necessary


class Touched(PrepareError):
    """A captured function used a value that changes from call to call."""


@final
class Untouchable:
    """In the place of an argument that changes with every call: any use of it is noticed, so that it may stay out of the program."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattribute__(self, name: str) -> Any:
        raise Touched(f"{object.__getattribute__(self, '_name')} is used and changes from call to call")

    def _refuse(self, *args: Any) -> NoReturn:
        raise Touched(f"{object.__getattribute__(self, '_name')} is used and changes from call to call")

    __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __hash__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = (
        _refuse
    )
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __neg__ = __float__ = __int__ = __index__ = __str__ = __repr__ = __format__ = __contains__ = _refuse


@final
class _Arguments:
    """Collects the leaves of one call while they are frozen."""

    __slots__ = ("_batch_size", "axes", "tensors", "values", "wanted")

    def __init__(self) -> None:
        self.tensors: list[Any] = []  # arrays or host arrays
        self.axes: list[int | None] = []
        self.values: list[Any] = []  # everything that is neither a tensor nor a container
        self.wanted: dict[int, torch.Tensor] = {}  # those that want a gradient
        self._batch_size: int | None = None

    def tensor(self, tensor: torch.Tensor) -> Key:
        """An argument: dim 0 is the batch where it has the size that the first argument has."""
        if isinstance(tensor, DeviceParameter):
            return _managed(tensor)
        if tensor.requires_grad:
            _refuse_lost_gradient(tensor)
            self.wanted[len(self.tensors)] = tensor
        value, axis = feed(tensor)
        if axis is not None:
            if self._batch_size is None:
                self._batch_size = tensor.shape[axis]
            elif tensor.shape[axis] != self._batch_size:
                axis = None
        self.tensors.append(value)
        self.axes.append(axis)
        return (LEAF, "t", len(self.tensors) - 1, tensor.dtype, tensor.shape, axis, tensor.requires_grad)

    def value(self, value: Any) -> Key:
        """A plain value or unknown object; it is compared separately from the structure."""
        self.values.append(value)
        return (LEAF, "v", len(self.values) - 1)


def _refuse_lost_gradient(tensor: torch.Tensor) -> None:
    """What a model computed outside of the function, and parameters that nobody prepared, would lose their gradients."""
    if isinstance(tensor, DeviceTensor):
        raise _lost_gradient(tensor)
    for leaf in leaves_of_graph(tensor):
        if isinstance(leaf, torch.nn.Parameter | DeviceTensor):
            raise _lost_gradient(tensor)


def _lost_gradient(tensor: torch.Tensor) -> PrepareError:
    return PrepareError(
        f"a value of shape {tuple(tensor.shape)} that a loss function uses requires grad, but is no parameter of a prepared model:"
        " its gradient would be lost",
        "pass it as an argument if it is an input, call requires_grad_() on it inside the loss function, or detach() it",
    )


def _managed(parameter: DeviceParameter) -> Key:
    """A prepared model's parameter beside its model: it enters by its name, and gets its gradient."""
    return (LEAF, "m", Identity(parameter))


def feed(tensor: torch.Tensor) -> tuple[Any, int | None]:
    """What a program takes for a tensor of user code, and its batch dim."""
    if isinstance(tensor, DeviceTensor):
        if tensor._cell is None:
            tensor._recorder.compute(tensor)
        value, axis = tensor._cell.feed()
        return value, axis
    placed = placed_array(tensor)
    if placed is not None:
        return placed, 0 if tensor.dim() else None
    return host_copy(tensor), 0 if tensor.dim() else None


def _typed(value: Any) -> Key:
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return (type(value), value)
    kind: Any = type(value)
    if kind.__eq__ is object.__eq__ or kind.__hash__ is None:
        return Identity(value)
    return (type(value), value)


@final
class Functions:
    """All loss functions of one recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._guards: dict[Any, FunctionGuard] = {}
        self._families: dict[Key, _Family] = {}

    def lower(self, call: LossCall, scale: float = 1.0) -> TorchCall:
        """A loss call as a program call; arguments that require grad get `scale` times their gradients.

        Raises PrepareError / UnsupportedError where it cannot be captured.
        """
        recorder = self._recorder
        recorder.settle()
        guard = self._guard(call.function)
        outside = guard.outside(call.function)
        packed = _Arguments()
        arguments = freeze((call.args, dict(call.kwargs)), packed.tensor, packed.value, packed.value)
        closure = _Closure()
        names = freeze(outside, closure.tensor, packed.value, packed.value)
        key = (guard.code or Identity(call.function), arguments, names)
        family = self._families.get(key)
        if family is None:
            found = [m for m in _prepared_in((call.args, call.kwargs, outside)) if m.recorder is recorder]
            models = tuple(dict.fromkeys(found)) or tuple(recorder.models)
            family = _Family(recorder, settle(arguments), settle(names), models, guard)
            self._families[settle(key)] = family
        if packed.wanted and recorder.num_processes > 1:
            raise UnsupportedError(
                "an argument of a loss function requires grad in a job of several processes",
                "call requires_grad_() on it and torch.autograd.grad inside the loss function",
            )
        return family.call(call.function, packed, closure.tensors, scale)

    def _guard(self, function: Any) -> FunctionGuard:
        plain = getattr(function, "__func__", function)
        code = getattr(plain, "__code__", None)
        key = code if code is not None else Identity(plain)
        found = self._guards.get(key)
        if found is None:
            found = self._guards[key] = FunctionGuard(function)
        return found


class _Closure:
    """Tensors that a function sees without being given them: inputs that are the same on every shard, or the loader's batch."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def tensor(self, tensor: torch.Tensor) -> Key:
        if isinstance(tensor, DeviceParameter):
            return _managed(tensor)
        self.tensors.append(tensor)
        is_batch = not isinstance(tensor, DeviceTensor) and placed_array(tensor) is not None
        return (LEAF, "c", len(self.tensors) - 1, tensor.dtype, tensor.shape, is_batch)


def _prepared_in(tree: Any) -> Iterator[ManagedModel]:
    from .packing import leaves_of

    for leaf in leaves_of(tree):
        if isinstance(leaf, PreparedModule):
            yield leaf._model
        elif isinstance(leaf, DeviceParameter):
            yield leaf._cell._model
        elif hasattr(leaf, "source") and isinstance(leaf.source, ManagedModel):
            yield leaf.source
        elif callable(leaf) and hasattr(leaf, "__code__"):
            inner = FunctionGuard(leaf).outside(leaf)
            yield from (value._model for value in inner.values() if isinstance(value, PreparedModule))


@final
class _Family:
    """All calls of one function with one structure of arguments."""

    def __init__(
        self, recorder: Recorder, arguments: Key, names: Key, models: tuple[ManagedModel, ...], guard: FunctionGuard
    ) -> None:
        self.recorder = recorder
        self.arguments = arguments
        self.names = names
        self.models = models
        self.guard = guard
        self._recipes: dict[Key, _FunctionRecipe] = {}
        self._policies: dict[int, str] = {}  # value index -> "input", "untouched" or "static"; static is the start
        self._last: tuple[Key, ...] | None = None

    def call(self, function: Any, packed: _Arguments, closure: list[torch.Tensor], scale: float) -> TorchCall:
        """The program call for these leaves."""
        values = tuple([_typed(value) for value in packed.values])
        modes = Modes.now()
        state = (tuple([model.guard.token() for model in self.models]), modes)
        recipe = self._recipes.get((state, self._static(values)))
        if recipe is None:
            recipe = self._new_recipe(function, packed, closure, values, state)
        self._last = values
        for model in self.models:
            model.push_writes()
        inputs, axes = list(packed.tensors), list(packed.axes)
        for tensor in closure:
            value, axis = feed(tensor)
            placed = not isinstance(tensor, DeviceTensor) and placed_array(tensor) is not None
            inputs.append(value)
            axes.append(axis if placed else None)
        inputs.extend(float(packed.values[index]) for index in recipe.numbers)
        axes.extend([None] * len(recipe.numbers))
        inputs.extend(recipe.found_values())
        axes.extend([None] * len(recipe.found))
        finish = partial(recipe.finish, wanted=packed.wanted, scale=scale) if packed.wanted else recipe.finish
        return TorchCall(recipe, handles(self.models), inputs, axes, finish)

    def _static(self, values: tuple[Key, ...]) -> Key:
        if not self._policies:
            return values
        return tuple([None if index in self._policies else value for index, value in enumerate(values)])

    def _new_recipe(
        self, function: Any, packed: _Arguments, closure: list[torch.Tensor], values: tuple[Key, ...], state: Key
    ) -> _FunctionRecipe:
        changed = (
            [] if self._last is None else [i for i, (a, b) in enumerate(zip(values, self._last, strict=True)) if a != b]
        )
        changed = [index for index in changed if self._policies.get(index) is None]
        before = dict(self._policies)
        if changed:
            for index in changed:
                self._policies[index] = "input" if type(packed.values[index]) is float else "untouched"
            try:
                recipe = self._made(function, packed, closure)
            except Exception:  # noqa: BLE001 - whatever the stand-ins broke: the real values below say what is the user's own
                self._policies = before
                self.recorder.note_recapture(self.guard, [packed.values[index] for index in changed])
                recipe = self._made(function, packed, closure)
        else:
            recipe = self._made(function, packed, closure)
        self._recipes[state, self._static(values)] = recipe
        return recipe

    def _made(self, function: Any, packed: _Arguments, closure: list[torch.Tensor]) -> _FunctionRecipe:
        numbers = tuple(sorted(index for index, policy in self._policies.items() if policy == "input"))
        untouched = frozenset(index for index, policy in self._policies.items() if policy == "untouched")
        return _FunctionRecipe(self, function, list(packed.values), closure, numbers, untouched, packed)


@final
class _FunctionRecipe:
    """One captured form of a loss function."""

    def __init__(
        self,
        family: _Family,
        function: Any,
        values: list[Any],
        closure: list[torch.Tensor],
        numbers: tuple[int, ...],
        untouched: frozenset[int],
        packed: _Arguments,
    ) -> None:
        self.numbers = numbers
        self.found: list[torch.Tensor] = []  # tensors from outside that the function uses without naming them
        self._found_copies: list[tuple[int, Any]] = []
        self._family = family
        self._function = function
        self._values = values
        self._closure = list(closure)
        self._untouched = untouched
        self._modes = Modes(True, Modes.now().autocast)
        self._structure: Key = None
        self._has_aux = False
        self._effects = NO_EFFECTS  # what a call does to Python attributes
        self._autocast = family.recorder.autocast_dtype
        self._num_arguments = len(packed.tensors)
        tensors = _tensor_leaves(family.arguments)
        self._dtypes = [d[3] for d in tensors] + [t.dtype for t in closure] + [torch.float32] * len(numbers)
        self._axes: list[int | None] = [d[5] for d in tensors] + [
            0 if d[5] and d[4] else None for d in _tensor_leaves(family.names)
        ]
        self._axes += [None] * len(numbers)
        self._specs = [OutSpec(d[4], d[3], d[6]) for d in tensors]
        self._needing = frozenset(packed.wanted)
        self._input_grads: tuple[int, ...] = ()  # of those, what the loss depends on
        for outside in closure:
            if outside.requires_grad:
                raise _lost_gradient(outside)
        self._specs += [OutSpec(t.shape, t.dtype, False) for t in closure]
        self._specs += [OutSpec(torch.Size(()), torch.float32, False) for _ in numbers]
        self._look()

    # -- what is known before capture --------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Run once on fake tensors: finds structure, errors of the user's code, and tensors from outside."""

        def look() -> capturing.CaptureScope:
            scope: list[capturing.CaptureScope] = []

            def run(leaves: Sequence[torch.Tensor]) -> Any:
                scope.append(self._scope(leaves))
                with scope[0].active():
                    return self._user(leaves)

            infer(self._modules(), run, self._specs, self._modes)
            return scope[0]

        first = look()
        self._effects = learn(first, look)
        self.found = first.found
        for tensor in self.found:
            self._dtypes.append(tensor.dtype)
            self._axes.append(None)
            self._specs.append(OutSpec(tensor.shape, tensor.dtype, False))
            self._found_copies.append((-1, None))

    def found_values(self) -> list[Any]:
        """Present values of the tensors from outside, on the devices; sent again only after a write."""
        for index, tensor in enumerate(self.found):
            version = -2 if tensor.is_inference() else tensor._version
            if isinstance(tensor, DeviceTensor) or self._found_copies[index][0] != version:
                value = host_copy(capturing._plain(tensor))
                like = self._family.models[0].handle.params if self._family.models else {}
                if like:
                    value = on_all_devices(next(iter(like.values())), value)
                self._found_copies[index] = (version, value)
        return [value for _, value in self._found_copies]

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {model.handle.name: model.module for model in self._family.models}

    def _scope(self, leaves: Sequence[torch.Tensor]) -> capturing.CaptureScope:
        outside = [*self._closure, *self.found]
        start = self._num_arguments
        stand_ins = [*leaves[start : start + len(self._closure)], *leaves[len(leaves) - len(self.found) :]]
        prepared = [model.prepared for model in self._family.models if model.prepared is not None]
        return capturing.CaptureScope(prepared, self._autocast, list(zip(outside, stand_ins, strict=False)))

    def _user(self, leaves: Sequence[torch.Tensor]) -> Any:
        start = self._num_arguments + len(self._closure)
        numbers = dict(zip(self.numbers, leaves[start : start + len(self.numbers)], strict=True))

        def leaf(described: tuple[Any, ...]) -> Any:
            if described[1] == "t":
                return leaves[described[2]]
            if described[1] == "m":
                return described[2].value
            index = described[2]
            if index in numbers:
                return numbers[index]
            return Untouchable("an argument") if index in self._untouched else _public(self._values[index])

        args, kwargs = thaw(self._family.arguments, leaf)
        with _values_outside(self._function, self._family.names, leaf, self._values, numbers, self._untouched):
            return self._function(*args, **kwargs)

    # -- capture -----------------------------------------------------------------------------------------------------------

    def build(
        self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
    ) -> TrainingProgram:
        """Capture loss, gradients and auxiliary values at these shapes."""
        is_scaled = self._family.recorder.engine.plan.precision.loss_scaling is not None
        wanted = [
            replace(spec, requires_grad=index in self._needing)
            for index, spec in enumerate(tensor_specs(specs, self._dtypes))
        ]
        inputs = [*wanted, TensorSpec((), torch.float32)] if is_scaled else wanted
        seen: list[list[OutSpec]] = []

        def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            scale = leaves[-1] if is_scaled else None
            arguments = leaves[:-1] if is_scaled else leaves
            scope = self._scope(arguments)
            with scope.active(), self._modes.active():
                result = self._user(arguments)
            checked = _checked(result)
            self._has_aux = checked is result
            self._structure, tensors = freeze_result(checked)
            loss = tensors[0]
            seen.append([OutSpec(t.shape, t.dtype, False) for t in tensors[1:]])
            return loss if scale is None else loss * scale, tensors

        graph = capture_training(function, self._modules(), inputs, autocast=None)
        axes = self._output_axes(specs, seen[-1], num_shards)
        self._input_grads = graph.input_grads
        return TrainingProgram(
            graph,
            numpy_dtypes(self._dtypes),
            axes,
            shard_call,
            is_scaled=is_scaled,
            input_axes=self._axes,
            input_scale=1 / num_shards,  # each shard differentiates the mean over its own samples
        )

    def _output_axes(self, specs: Sequence[ArraySpec], seen: list[OutSpec], num_shards: int) -> list[int | None]:
        batch_size = batch_size_of([spec.shape for spec in specs], self._axes)
        if num_shards == 1 or not any(spec.shape for spec in seen):
            return batch_axes(seen, None, batch_size)
        local = [OutSpec(torch.Size(spec.shape), dtype, False) for spec, dtype in zip(specs, self._dtypes, strict=True)]

        def run(leaves: Sequence[torch.Tensor]) -> Any:
            with self._scope(leaves).active():
                return _checked(self._user(leaves))

        _, large = infer(self._modules(), run, grown(local, self._axes, 2), self._modes)
        return batch_axes(seen, large[1:], batch_size)

    def describe(self) -> tuple[str, dict[str, str]]:
        """The function's name, and what its program is specialised on."""

        def leaf(described: tuple[Any, ...]) -> str | None:
            if described[1] in ("t", "c"):
                return shown(described[3], described[4])
            if described[1] == "m" or described[2] in self._untouched or described[2] in self.numbers:
                return None
            value = self._values[described[2]]
            return None if isinstance(getattr(value, "source", value), PreparedModule | ManagedModel) else short(value)

        family = self._family
        facts = facts_of_arguments(self._function, family.arguments, leaf)
        names = thaw(family.names, lambda found: leaf(found) if found[1] in ("v", "c") else None)
        facts |= {name: text for name, text in names.items() if isinstance(text, str)}
        return name_of(self._function), {**facts, **facts_of_models(family.models)}

    def auxiliary(self, name: str, outputs: list[Any]) -> Any:
        """Traced: the auxiliary value of this name among the program's outputs. Raises UnsupportedError where there is none."""
        everything = [None, *outputs]
        return named_weight(rebuild(self._structure, everything.__getitem__) if self._has_aux else None, name)

    def finish(
        self, loss: Any, outputs: list[Any], wanted: Mapping[int, torch.Tensor] | None = None, scale: float = 1.0
    ) -> Any:
        """The structure that the function returned, with DeviceTensors. Arguments that want a gradient get it."""
        self._effects.apply()
        recorder = self._family.recorder
        if wanted:
            gradients = outputs[len(outputs) - len(self._input_grads) :]
            by_input = [(wanted[index], array) for index, array in zip(self._input_grads, gradients, strict=True)]
            receive(recorder.engine, by_input, scale, retain_graph=False)
        everything = [loss, *outputs]
        result = rebuild(self._structure, lambda index: lifted(recorder, everything[index]))
        return result if self._has_aux else result[0]


def _tensor_leaves(key: Key) -> list[tuple[Any, ...]]:
    from .packing import described

    return [found for found in described(key) if found[1] in ("t", "c")]


def _public(value: Any) -> Any:
    source = getattr(value, "source", None)
    return source.prepared if isinstance(source, ManagedModel) else value


def _checked(result: Any) -> tuple[torch.Tensor, Any]:
    checked = result if type(result) is tuple and len(result) == 2 else (result, None)
    loss = checked[0]
    if not isinstance(loss, torch.Tensor):
        raise PrepareError(
            f"the loss function returned a {type(loss).__name__} as its loss, not a tensor",
            "return the loss, or (loss, auxiliary values)",
        )
    return checked


@contextlib.contextmanager
def _values_outside(
    function: Any,
    names: Key,
    leaf: Callable[[tuple[Any, ...]], Any],
    values: list[Any],
    numbers: dict[int, torch.Tensor],
    untouched: frozenset[int],
) -> Iterator[None]:
    """Closure cells and globals whose values change are replaced while the function runs."""
    if not numbers and not untouched:
        yield
        return
    saved: list[Callable[[], None]] = []
    plain = getattr(function, "__func__", function)
    seen = thaw(names, lambda described: leaf(described) if described[1] == "v" else None)
    original = thaw(names, lambda described: values[described[2]] if described[1] == "v" else None)
    cells = (
        dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
        if hasattr(plain, "__code__")
        else {}
    )
    try:
        for name, value in seen.items():
            if value is original[name] or not (isinstance(value, torch.Tensor) or type(value) is Untouchable):
                continue
            if name in cells:
                cell, before = cells[name], cells[name].cell_contents
                cell.cell_contents = value
                saved.append(lambda cell=cell, before=before: setattr(cell, "cell_contents", before))  # type: ignore[misc]
            elif name in plain.__globals__:
                scope, before = plain.__globals__, plain.__globals__[name]
                scope[name] = value
                saved.append(lambda scope=scope, name=name, before=before: scope.__setitem__(name, before))  # type: ignore[misc]
        yield
    finally:
        for restore in saved:
            restore()


def lifted(recorder: Recorder, array: Any, axis: int | None = None) -> DeviceTensor:
    """A device array as user code sees it: this process's part."""
    engine = recorder.engine
    local = array if recorder.num_processes == 1 else engine.local(array)
    return DeviceTensor.make(
        recorder, torch.Size(local.shape), torch_dtype(local.dtype.name), cell=ArrayCell(engine, array, axis)
    )
