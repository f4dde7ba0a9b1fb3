"""Operations and model calls that a recording meets for the first time are tried on fake tensors: what they give, write and need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from polyaccel.errors import PrepareError

from . import scope as capturing
from .attributes import learn
from .changing_numbers import Changing, Numbers, changing, may_differ, number_key
from .packing import Key, described, settle, thaw
from .recordings import Entry, Floats, Session, Shadows
from .shadows import OutSpec, ValueDependent, freeze_result, infer, spec_of
from .tensors import DeviceTensor

if TYPE_CHECKING:
    from .modules import ManagedModel
    from .tape import Recorder

_log = logging.getLogger(__name__)
_MANY = (
    8  # forms of one operation in one place before torch computes it, so that nothing is compiled for each further one
)
_VALUES = "the shape of its result depends on values"
_UNKNOWN = "nothing says what it gives without running it"
_NUMBERS = "its arguments change from step to step, and every value would be compiled anew"


def add(session: Session, entry: Entry, key: Key, numbers: Numbers) -> Entry:
    """Put an entry into the trie, below the session's present one."""
    children = session.entry.children
    if not numbers:
        children[settle(key)] = entry
        return entry
    floats = children.get(key)
    if type(floats) is not Floats:
        floats = children[settle(key)] = Floats()
    if entry.numbers is None:
        floats.dynamic = entry
    else:
        floats.variants[number_key(numbers)] = entry
    return entry


def try_operation(session: Session, key: Any, numbers: Numbers, operands: Sequence[torch.Tensor]) -> Entry:
    """The entry of an operation that was not seen after this sequence of others.

    Raises what torch raises for wrong arguments, and PrepareError for writes that would be lost.
    """
    func, modes = key[:2]
    if _num_forms(session.entry, func, modes) >= _MANY:
        entry = Entry(session.entry, func, (), modes, ())
        entry.unfollowed = _NUMBERS
        return entry  # not kept: there may be any number of them
    trial = _Trial(session, key)
    known = _known(session, key, numbers)
    found = None if known is None else _with_changing_numbers(trial, session, func, known, numbers)
    entry = found or trial.run(func, numbers, None)
    if known is None and session.own_copies is not None and may_differ(func) and entry.unfollowed is None:
        # A constant would make another program on each process whose number is another one.
        entry = _with_changing_numbers(trial, session, func, entry, numbers) or trial.run(func, numbers, None)
    if numbers and known is None and entry.unfollowed is None:
        session.seen[entry.position, settle(key)] = numbers, entry
    if entry.unfollowed is None:
        _note_effects(trial, entry, operands)
        if entry.value is None and not entry.is_eager:
            trial.shadows.keep(entry.position, trial.tensors)
    return add(session, entry, key, numbers)


def _known(session: Session, key: Key, numbers: Numbers) -> Entry | None:
    """The operation in this place with other numbers, on this or on another path: then they change from step to step."""
    found = session.seen.get((session.entry.position + 1, key)) if numbers else None
    return None if found is None or number_key(found[0]) == number_key(numbers) else found[1]


def _num_forms(parent: Entry, func: Any, modes: Any) -> int:
    count = 0
    for key, child in parent.children.items():
        if key[0] is func and key[1] == modes:  # type: ignore[index]
            count += len(child.variants) if type(child) is Floats and child.dynamic is None else 1
    return count


class _Trial:
    """One operation on the shadows of its operands."""

    def __init__(self, session: Session, key: Any) -> None:
        self.session = session
        self.func, self.modes, self.arguments = key
        if session.shadows is None:
            session.shadows = Shadows(session)
        self.shadows = session.shadows
        self.leaves: list[tuple[Any, ...]] = []
        self.fakes: list[torch.Tensor] = []
        self.before: list[tuple[int, OutSpec]] = []
        self.tensors: list[torch.Tensor] = []
        self.result: Any = None

    def run(self, func: Callable[..., Any], numbers: Numbers, how: Changing | None) -> Entry:
        """The entry of `func` here; with `how`, numbers are inputs. Its fields say what is known from the fakes."""
        session = self.session
        entry = Entry(session.entry, func, settle(self.arguments), self.modes, numbers if how is None else None)
        entry.changing = how
        self.leaves, self.fakes = [], []

        def leaf(found: tuple[Any, ...]) -> Any:
            fake = self.shadows.leaf(found, entry)
            if found[1] != "f":
                self.leaves.append(found)
                self.fakes.append(fake)
            return fake

        with self.shadows.fakes.active(), self.modes.active():
            args, kwargs = thaw(self.arguments, leaf)
            self.before = [(fake._version, spec_of(fake)) for fake in self.fakes]
            try:
                self.result = func(*args, **kwargs)
            except (*ValueDependent, UnsupportedOperatorException) as error:
                session.shadows = None
                entry.unfollowed = _UNKNOWN if isinstance(error, UnsupportedOperatorException) else _VALUES
                return entry
            except Exception:
                session.shadows = None  # they may have been written to
                raise
        entry.structure, self.tensors = freeze_result(self.result)
        entry.specs = [spec_of(tensor) for tensor in self.tensors]
        return entry


def _with_changing_numbers(trial: _Trial, session: Session, func: Any, known: Entry, numbers: Numbers) -> Entry | None:
    """The entry whose numbers are inputs, if it gives what the known one with constant numbers gives."""
    operands = [trial.shadows.leaf_spec(found) for found in described(trial.arguments) if found[1] != "f"]
    how = changing(func, numbers, operands, known.specs)
    if how is None or known.unfollowed is not None:
        return None
    try:
        entry = trial.run(how.func, numbers, how)
    except (RuntimeError, TypeError, ValueError):  # an operation that takes no tensor there: its numbers stay constants
        entry = None
    if entry is None or entry.unfollowed is not None or entry.specs != known.specs:
        session.shadows = None
        trial.__init__(session, (trial.func, trial.modes, trial.arguments))  # type: ignore[misc]
        return None
    return entry


def _note_effects(trial: _Trial, entry: Entry, operands: Sequence[torch.Tensor]) -> None:
    tensors, fakes = trial.tensors, trial.fakes
    entry.writes = tuple(
        i for i, (fake, old) in enumerate(zip(fakes, trial.before, strict=True)) if fake._version != old[0]
    )
    entry.gives_view = any(tensor._is_view() for tensor in tensors)
    is_written = bool(entry.writes)
    if not tensors and not is_written:
        entry.value = (trial.result,)
    available = all(operand._cell is not None for operand in operands if isinstance(operand, DeviceTensor))
    if tensors and not is_written and available and not any(tensor.requires_grad for tensor in tensors):
        entry.is_eager = True
    for out, tensor in enumerate(tensors):
        for operand, fake in enumerate(fakes):
            if tensor is fake:
                entry.same[out] = operand
    for operand, (fake, old) in enumerate(zip(fakes, trial.before, strict=True)):
        if spec_of(fake) != old[1]:
            entry.updates.append((operand, spec_of(fake)))
    if is_written and available and all(trial.leaves[index][1] == "p" for index in entry.writes):
        entry.is_eager = True  # torch.nn.init and its like: they write to parameters under their own no_grad
    elif is_written:
        _refuse_written_inputs(entry, trial.leaves)


def _refuse_written_inputs(entry: Entry, leaves: Sequence[tuple[Any, ...]]) -> None:
    for leaf in (leaves[index] for index in entry.writes):
        if leaf[1] != "r":
            raise PrepareError(
                f"{getattr(entry.func, '__name__', entry.func)} writes a value that a model computed into a tensor of shape"
                f" {tuple(leaf[4])} that is no part of the recorded computation",
                "use the operation that returns a new tensor instead of the one that writes in place",
            )


# -- models ----------------------------------------------------------------------------------------------------------------


def look_at_model(
    recorder: Recorder, session: Session, model: ManagedModel, token: Any, key: Any, numbers: Numbers
) -> Entry:
    """The entry of a model call that was not seen after this sequence of others.

    Raises PrepareError with the user's line where its outputs depend on values.
    """
    known = session.entry.children.get(key)
    if type(known) is Floats and known.variants:
        before = next(iter(known.variants.values()))
        try:
            entry = _looked_at(recorder, session, model, token, key, numbers, Changing(_called, torch.float32))
        except Exception:  # noqa: BLE001 - whatever a tensor in the place of a number broke: with the number it is the user's own
            entry = None
        if entry is not None and (entry.structure, entry.specs) == (before.structure, before.specs):
            return add(session, entry, key, numbers)
        if len(known.variants) == _MANY:
            _log.warning(
                "%s was called with %d different Python numbers, and is captured and compiled for each: pass them as tensors",
                type(model.module).__name__,
                _MANY,
            )
    return add(session, _looked_at(recorder, session, model, token, key, numbers, None), key, numbers)


def _called(*args: Any) -> Any:
    raise AssertionError("a model call is no function")


def _looked_at(
    recorder: Recorder,
    session: Session,
    model: ManagedModel,
    token: Any,
    key: Any,
    numbers: Numbers,
    how: Changing | None,
) -> Entry:
    _, modes, arguments = key
    entry = Entry(session.entry, None, settle(arguments), modes, numbers if how is None else None)
    entry.model, entry.token, entry.changing = model, token, how
    places: list[Key] = []
    specs: list[OutSpec] = []

    def collect(found: tuple[Any, ...]) -> Any:
        if found[1] != "f" and found[:4] not in places:
            places.append(found[:4])
            specs.append(_operand_spec(session, found))

    thaw(arguments, collect)

    def look() -> capturing.CaptureScope:
        scope = capturing.CaptureScope([model.prepared], recorder.autocast_dtype)  # type: ignore[list-item]

        def run(leaves: Any) -> Any:
            def leaf(found: tuple[Any, ...]) -> Any:
                if found[1] == "f":
                    return numbers[found[2]] if how is None else how.example
                return leaves[places.index(found[:4])]

            args, kwargs = thaw(arguments, leaf)
            with scope.active():
                return scope.call(model.prepared, args, kwargs)  # type: ignore[arg-type]

        entry.structure, entry.specs = infer({model.handle.name: model.module}, run, specs, modes)
        return scope

    scope = look()
    entry.writes_params = scope.writes_params
    entry.effects = learn(scope, look)
    return entry


def _operand_spec(session: Session, found: tuple[Any, ...]) -> OutSpec:
    if found[1] == "r":
        path = session.path()
        spec = path[found[2]].specs[found[3]]
        for entry in path[found[2] + 1 :]:  # writes in place may have made it need a gradient
            leaves = [leaf for leaf in described(entry.arguments) if leaf[1] != "f"] if entry.updates else []
            for operand, now in entry.updates:
                spec = now if leaves[operand][1:4] == found[1:4] else spec
        return spec
    return OutSpec(found[4], found[3], found[5])
