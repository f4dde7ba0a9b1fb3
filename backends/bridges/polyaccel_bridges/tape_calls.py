"""Recordings as program calls: for the values that user code looks at, and for the gradients of a loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch

from polyaccel.protocols import ArraySpec

from .calls import TorchCall, handles
from .descriptions import facts_of_models, shown
from .input_gradients import receive
from .kept_gradients import GradientsRecipe
from .loop_constants import constants_of
from .own_values import OWN
from .tensors import STACKED, ArrayCell, DeviceTensor

if TYPE_CHECKING:
    from .modules import ManagedModel
    from .recordings import Entry, Session
    from .tape import Recorder

Place = tuple[int, int, int]  # (recording, position, output)
Keep = Callable[[dict[str, Any], list[tuple[torch.Tensor, Any]]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One recording within a program: the operations of it that are needed, and where its values stand among the inputs."""

    entries: tuple[Entry, ...]
    floats: dict[int, list[int]]  # by position: the inputs that hold its changing Python floats
    models: tuple[ManagedModel, ...]
    first_input: int
    num_inputs: int
    externals: tuple[Place, ...]
    buffer_inputs: dict[
        str, int
    ]  # buffers and written parameters that come as inputs; empty: the models' present ones count
    draw_input: int | None  # where the number of its random stream stands, when it is not the call's own
    is_executed: bool

    def at(self, position: int) -> Entry:
        """The operation at a position of the recording."""
        found = next((entry for entry in self.entries if entry.position == position), None)
        assert found is not None
        return found

    def uses(self) -> frozenset[int]:
        """The models (by index) whose values its operations use."""
        used = set()
        for entry in self.entries:
            if entry.model is not None:
                used.add(self.models.index(entry.model))
            used.update(leaf[2][0] for leaf in operands_of(entry) if leaf[1] == "p")
        return frozenset(used)


@final
class TapeRecipe:
    """The programs of one recorded sequence of operations."""

    def __init__(
        self,
        recorder: Recorder,
        parts: Sequence[Part],
        loss: Place | None,
        wanted: Sequence[Place],
        axes: Sequence[int | None],
    ) -> None:
        self.recorder = recorder
        self.parts = tuple(parts)
        self.loss = loss
        self.wanted = tuple(wanted)
        self.axes = tuple(axes)
        self.models = tuple(dict.fromkeys(model for part in parts for model in part.models))
        self.output_axes: tuple[int | None, ...] = ()
        self.writes_buffers = False  # known once it is built, as the axes are
        self.written_params: frozenset[str] = frozenset()
        self.consumed = frozenset() if loss is None else _ancestors(self.parts, loss)
        self.spent = _spent(self.parts)
        self.used = tuple(part.uses() for part in self.parts)
        self.input_grads: tuple[int, ...] = ()  # inputs whose gradients come out behind the wanted values
        self.constants = None if loss is None or recorder.num_processes == 1 else constants_of(self.parts, loss)
        self.apart = GradientsRecipe(self)

    def wanted_inputs(self, part: int) -> list[int]:
        """The inputs of a recording that want a gradient."""
        leaves = [leaf for entry in self.parts[part].entries for leaf in operands_of(entry)]
        return sorted({leaf[2] for leaf in leaves if wants_gradient(leaf)})

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any) -> Any:
        """Capture the program: in one piece on one data shard, else model calls per shard and the rest on global values."""
        from .fused import fused_program
        from .pieces import composed_program

        is_whole = len(self.parts) == 1 and num_shards == 1 and self.recorder.num_processes == 1
        build = fused_program if is_whole else composed_program
        program = build(self, specs, with_grads=with_grads, num_shards=num_shards, shard_call=shard_call)
        self.output_axes, self.writes_buffers = program.output_axes, program.writes_buffers
        self.input_grads, self.written_params = program.input_grads, program.written_params
        return program

    def describe(self) -> tuple[str, dict[str, str]]:
        """The recorded loop by its models, and what its program is specialised on."""
        facts: dict[str, str] = {}
        for number, part in enumerate(self.parts):
            prefix = f"recording {number}, " if len(self.parts) > 1 else ""
            facts[f"{prefix}operations"] = str(len(part.entries))
            for entry in part.entries:
                for leaf in operands_of(entry):
                    if leaf[1] == "i":
                        facts[f"{prefix}input {leaf[2]}"] = shown(leaf[3], leaf[4])
        names = ", ".join(dict.fromkeys(type(model.module).__name__ for model in self.models))
        return f"the loop of {names or 'no model'}", {**facts, **facts_of_models(self.models)}

    def cell(self, array: Any, axis: int | None) -> ArrayCell:
        """An output as user code's value: its own process's, where each has another one."""
        recorder = self.recorder
        row = recorder.process_index if axis is None and recorder.num_processes > 1 else None
        return ArrayCell(recorder.engine, array, axis, row)

    def spec(self, place: Place) -> Any:
        """What is known of a recorded value."""
        part, position, out = place
        return self.parts[part].at(position).specs[out]


def placed_axes(axes: Sequence[int | None]) -> list[int | None]:
    """The dims along which the engine cuts a recording's inputs."""
    return [None if axis == STACKED else 0 if axis == OWN else axis for axis in axes]


def operands_of(entry: Entry) -> list[tuple[Any, ...]]:
    """The described tensor operands of an operation."""
    from .packing import described

    return [found for found in described(entry.arguments) if found[1] != "f"]


def is_spent(leaf: tuple[Any, ...]) -> bool:
    """Whether an operand is a value whose graph was freed."""
    return bool(leaf[1] == "i" and leaf[5] and not wants_gradient(leaf))


def wants_gradient(leaf: tuple[Any, ...]) -> bool:
    """Whether an operand is an input of user code that gets a gradient."""
    return leaf[1] == "i" and len(leaf) > 7


def float_inputs(entries: Sequence[Entry]) -> dict[int, list[int]]:
    """By position of an operation: the inputs that hold its changing Python floats, in order. `entries` is a whole recording."""
    from .packing import described

    found: dict[int, list[int]] = {}
    num_inputs = 0
    for entry in entries:
        for leaf in operands_of(entry):
            if leaf[1] == "i":
                num_inputs = max(num_inputs, leaf[2] + 1)
        if entry.numbers is None:
            count = sum(leaf[1] == "f" for leaf in described(entry.arguments))
            found[entry.position] = list(range(num_inputs, num_inputs + count))
            num_inputs += count
    return found


def _needed(path: list[Entry], roots: set[int]) -> list[Entry]:
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        position = waiting.pop()
        if position not in found:
            found.add(position)
            waiting.extend(leaf[2] for leaf in operands_of(path[position]) if leaf[1] == "r")
    return [entry for entry in path if entry.position in found]


def _ancestors(parts: Sequence[Part], loss: Place) -> frozenset[tuple[int, int]]:
    """Every operation through which gradients of the loss pass. Raises where one of them was freed by an earlier backward."""
    from .tape import SECOND

    writers: dict[Place, list[tuple[int, int]]] = {}
    for index, part in enumerate(parts):
        for entry in part.entries:
            leaves = operands_of(entry)
            for operand in entry.writes:
                found = leaves[operand]
                if found[1] == "r":
                    writers.setdefault((index, found[2], found[3]), []).append((index, entry.position))
    seen: set[tuple[int, int]] = set()
    waiting = [(loss[0], loss[1]), *writers.get(loss, ())]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        index, position = at
        entry = parts[index].at(position)
        if not entry.modes.is_grad_enabled:
            continue
        for found in operands_of(entry):
            if is_spent(found):
                raise RuntimeError(SECOND)
            place = (
                parts[index].externals[found[2]]
                if found[1] == "x"
                else (index, found[2], found[3] if found[1] == "r" else 0)
            )
            if found[1] in ("r", "x") and parts[place[0]].at(place[1]).specs[place[2]].requires_grad:
                waiting.append((place[0], place[1]))
                waiting.extend(writers.get(place, ()))
    return frozenset(seen)


def _spent(parts: Sequence[Part]) -> frozenset[tuple[int, int]]:
    """Every operation on a value whose graph was freed: what it gives can be read, and never differentiated."""
    found: set[tuple[int, int]] = set()
    for index, part in enumerate(parts):
        for entry in part.entries:
            for leaf in operands_of(entry):
                if (
                    is_spent(leaf)
                    or (leaf[1] == "r" and (index, leaf[2]) in found)
                    or (leaf[1] == "x" and part.externals[leaf[2]][:2] in found)
                ):
                    found.add((index, entry.position))
    return frozenset(found)


# -- from live recordings to calls -----------------------------------------------------------------------------------------


def _ordered(session: Session) -> list[Session]:
    found: list[Session] = []

    def visit(one: Session) -> None:
        for tensor in one.externals:
            assert tensor._ref is not None
            if tensor._ref.session not in found:
                visit(tensor._ref.session)
        if one not in found:
            found.append(one)

    visit(session)
    return found


@final
class _Assembly:
    """The inputs of one call, and the key of its recipe."""

    def __init__(self, recorder: Recorder, session: Session) -> None:
        self.sessions = _ordered(session)
        self.inputs: list[Any] = []
        self.axes: list[int | None] = []
        self.parts: list[Part] = []
        self.draw = session.draw
        key: list[Any] = []
        for one in self.sessions:
            externals = tuple(self._place(tensor) for tensor in one.externals)
            first = len(self.inputs)
            self._extend(one.inputs, one.axes)
            buffers = self._buffers(one)
            draw_input = None
            if one.draw != self.draw:
                draw_input = len(self.inputs)
                self._extend([recorder.draw_key(one.draw)], [None])
            key.append(
                (one.entry, len(one.inputs), externals, tuple(buffers), draw_input, one.is_executed, len(one.models))
            )
            self.parts.append(
                Part((), {}, tuple(one.models), first, len(one.inputs), externals, buffers, draw_input, one.is_executed)
            )
        self.key = (*key, tuple(self.axes))

    def finished_parts(self, loss: Place | None, wanted: Sequence[Place]) -> list[Part]:
        """The parts with the operations that loss and wanted values need; an executed recording has no other effects."""
        roots: dict[int, set[int]] = {index: set() for index in range(len(self.parts))}
        for place in (*wanted, *([] if loss is None else [loss])):
            roots[place[0]].add(place[1])
        finished: list[Part] = []
        for index in reversed(range(len(self.parts))):
            path, part = self.sessions[index].path(), self.parts[index]
            changes = any(entry.writes or entry.writes_params for entry in path)
            if part.is_executed and not changes:
                path = _needed(path, roots[index])
            for entry in path:
                for leaf in operands_of(entry):
                    if leaf[1] == "x":
                        place = part.externals[leaf[2]]
                        roots[place[0]].add(place[1])
            floats = float_inputs(self.sessions[index].path())
            finished.append(replace(part, entries=tuple(path), floats=floats))
        return finished[::-1]

    def refuse_changed_parameters(self, recipe: TapeRecipe) -> None:
        """Raise, as torch does, where parameters that a recording uses changed since."""
        for session, used in zip(self.sessions, recipe.used, strict=True):
            session.refuse_changed_parameters(used)

    def _extend(self, values: Sequence[Any], axes: Sequence[int | None]) -> None:
        self.inputs.extend(values)
        self.axes.extend(axes)

    def _place(self, tensor: DeviceTensor) -> Place:
        assert tensor._ref is not None
        return self.sessions.index(tensor._ref.session), tensor._ref.position, tensor._ref.out

    def _buffers(self, session: Session) -> dict[str, int]:
        if not session.is_executed or not session.writes_buffers:
            return {}
        found: dict[str, int] = {}
        for model, buffers in session.start_buffers.items():
            for name, array in buffers.items():
                found[f"{model.handle.name}.{name}"] = len(self.inputs)
                self._extend([array], [None])
        for model, name in sorted(session.written_params, key=lambda place: (place[0].handle.name, place[1])):
            found[f"{model.handle.name}.{name}"] = len(self.inputs)
            self._extend([session.start_params[session.models.index(model)][name]], [None])
        return found


def value_call(recorder: Recorder, session: Session) -> TorchCall:
    """The values of a recording that user code holds and that do not exist yet."""
    pending = [(position, out, tensor) for position, out, tensor in session.live() if tensor._cell is None]
    assembly = _Assembly(recorder, session)
    index = len(assembly.sessions) - 1
    wanted = tuple((index, position, out) for position, out, _ in pending)
    recipe = _recipe(recorder, session, assembly, None, wanted)
    tensors = [weakref.ref(tensor) for _, _, tensor in pending]

    def finish(loss: Any, outputs: list[Any]) -> None:
        for place, ref, array, axis in zip(wanted, tensors, outputs, recipe.output_axes, strict=True):
            tensor = ref()
            if tensor is not None:
                tensor._cell = recipe.cell(array, axis)
                if not tensor._requires_grad:
                    tensor._ref = None
                elif place[:2] in recipe.spent:
                    tensor._ref, tensor._is_spent = None, True

    return _call(recorder, recipe, recipe, assembly, finish)


def release(tensor: DeviceTensor, place: Place, recipe: TapeRecipe, *, retain_graph: bool) -> None:
    """After a backward: a recorded value that has no further use for its recording lets it go."""
    if not tensor._requires_grad:
        tensor._ref = None
    elif place[:2] in recipe.spent or (place[:2] in recipe.consumed and not retain_graph):
        tensor._ref, tensor._is_spent = None, True


def loss_call(
    recorder: Recorder,
    loss: DeviceTensor,
    *,
    retain_graph: bool = False,
    scale: float = 1.0,
    keep: Keep | None = None,
) -> TorchCall:
    """The gradients of a recorded loss, with every value of its recordings that user code still holds.

    Inputs that want a gradient get theirs times `scale`. With `keep` no gradient is added to anything: the call is one without
    gradients of its own, and `keep(by parameter, [(input, gradient)])` gets them.
    """
    assert loss._ref is not None
    session = loss._ref.session
    assembly = _Assembly(recorder, session)
    index = len(assembly.sessions) - 1
    held: list[tuple[Place, DeviceTensor]] = []
    for number, one in enumerate(assembly.sessions):
        held.extend(((number, position, out), tensor) for position, out, tensor in one.live())
    wanted = tuple(place for place, tensor in held if tensor._cell is None)
    recipe = _recipe(recorder, session, assembly, (index, loss._ref.position, loss._ref.out), wanted)
    pending = [weakref.ref(tensor) for _, tensor in held if tensor._cell is None]
    everything = [(place, weakref.ref(tensor)) for place, tensor in held]
    inputs = {
        part.first_input + number: tensor
        for one, part in zip(assembly.sessions, assembly.parts, strict=True)
        for number, tensor in one.wanted.items()
    }

    def finish(value: Any, outputs: list[Any]) -> None:
        by_parameter: dict[str, Any] = {}
        if keep is not None:
            outputs, _, by_parameter = recipe.apart.split(outputs)
        values, rest = outputs[: len(pending)], outputs[len(pending) :]
        by_input = [(inputs[number], array) for number, array in zip(recipe.input_grads, rest, strict=True)]
        for ref, array, axis in zip(pending, values, recipe.output_axes, strict=False):
            tensor = ref()
            if tensor is not None:
                tensor._cell = recipe.cell(array, axis)
        for place, ref in everything:
            tensor = ref()
            if tensor is not None:
                release(tensor, place, recipe, retain_graph=retain_graph)
        session.note_run(recipe)
        if keep is not None:
            keep(by_parameter, by_input)
            return
        receive(recorder.engine, by_input, scale, retain_graph=retain_graph)
        session.note_backward()

    session.keep_start()
    return _call(recorder, recipe if keep is None else recipe.apart, recipe, assembly, finish)


def _recipe(
    recorder: Recorder, session: Session, assembly: _Assembly, loss: Place | None, wanted: tuple[Place, ...]
) -> TapeRecipe:
    key = (assembly.key, loss, wanted)
    recipe: TapeRecipe | None = session.entry.recipes.get(key)
    if recipe is None:
        recipe = TapeRecipe(recorder, assembly.finished_parts(loss, wanted), loss, wanted, assembly.axes)
        session.entry.recipes[key] = recipe
    assembly.refuse_changed_parameters(recipe)
    return recipe


def _call(recorder: Recorder, signature: Any, recipe: TapeRecipe, assembly: _Assembly, finish: Any) -> TorchCall:
    return TorchCall(
        signature,
        handles(recipe.models),
        assembly.inputs,
        placed_axes(assembly.axes),
        finish,
        is_global=True,
        draw=assembly.draw,
    )
