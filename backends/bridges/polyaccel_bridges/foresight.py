"""Values that a loop reads before its backward, `loss.item()` mostly: where backward follows, gradients are computed in the same run.

Every place of a loop where values were read remembers what came after. Where it was the backward of a loss that could have been
computed then, the next read there runs forward and backward as one program and keeps the gradients until backward asks for them;
otherwise backward computes the forward again. A guess that did not come true costs one backward, and makes the place wait
for twice as many steps that would have confirmed it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from .calls import TorchCall, handles
from .kept_gradients import GradientsRecipe
from .recordings import Entry, Session, path_to
from .tape_calls import Part, TapeRecipe, float_inputs, operands_of, placed_axes, release
from .tensors import DeviceTensor

if TYPE_CHECKING:
    from .tape import Recorder
    from .tensors import ArrayCell

_MOST = 1024
At = tuple[int, int]  # (position, output)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A backward that could have been computed at the read: the operations up to its loss and to `later`, values wanted after the read."""

    entry: Entry
    loss: At
    later: tuple[At, ...]


@final
class Site:
    """A place of a loop where values were read, and what came after the last reads."""

    __slots__ = ("foreseen", "is_open", "needed", "streak")

    def __init__(self) -> None:
        self.foreseen: Foreseen | None = None
        self.streak = 0  # times that this was what came
        self.needed = 1  # before it is counted on
        self.is_open = False  # it was counted on, and did not come yet

    def expected(self) -> Foreseen | None:
        """What to count on at a further read."""
        if self.is_open:
            self.missed()
        return self.foreseen if self.streak >= self.needed else None

    def missed(self) -> None:
        """What was counted on did not come."""
        self.is_open = False
        self.streak, self.needed = 0, min(2 * self.needed, _MOST)

    def came_true(self) -> None:
        """What was counted on came."""
        self.is_open = False
        self.needed = max(1, self.needed // 2)

    def observe(self, now: Foreseen | None) -> None:
        """Backward came in this way; None: in one that cannot be foreseen."""
        self.streak = self.streak + 1 if now is not None and now == self.foreseen else int(now is not None)
        self.foreseen = now


@final
class FirstRead:
    """The first read of a recording: where it was, which values were given, and what was computed ahead for it."""

    __slots__ = ("ahead", "entry", "later", "num_inputs", "num_models", "wanted")

    def __init__(self, session: Session) -> None:
        self.entry = session.entry
        self.num_inputs = len(session.inputs)
        self.num_models = len(session.models)
        self.wanted: tuple[At, ...] = tuple((position, out) for position, out, _ in _pending(session))
        self.later: set[At] = set()  # values that were read after it
        self.ahead: Ahead | None = None

    @property
    def site(self) -> Site:
        """What is known of this place."""
        if self.entry.site is None:
            self.entry.site = Site()
        found: Site = self.entry.site
        return found


@final
class Ahead:
    """Values and gradients that were computed together at a read, or are now."""

    def __init__(self, recorder: Recorder, session: Session, first: FirstRead, foreseen: Foreseen) -> None:
        self.foreseen = foreseen
        self.recipe = _recipe(recorder, session, first, foreseen)
        self.loss: Any = None
        self.gradients: list[Any] = []
        self._cells: dict[At, ArrayCell] = {}
        tape = self.recipe.tape
        session.refuse_changed_parameters(tape.used[0])
        axes = placed_axes(tape.axes)
        inputs = session.inputs[: first.num_inputs]
        me = weakref.ref(self)  # the engine keeps the last call of a recipe, and these gradients are large

        def finish(loss: Any, outputs: list[Any]) -> None:
            kept = me()
            assert kept is not None
            kept._keep(outputs)

        call = TorchCall(self.recipe, handles(tape.models), inputs, axes, finish, is_global=True, draw=session.draw)
        recorder.engine.run_forward(call)

    def _keep(self, outputs: list[Any]) -> None:
        tape = self.recipe.tape
        values, self.loss, gradients = self.recipe.split(outputs)
        self.gradients = list(gradients.values())
        for place, array, axis in zip(tape.wanted, values, tape.output_axes, strict=True):
            self._cells[place[1:]] = tape.cell(array, axis)

    def give(self, session: Session, first: FirstRead) -> None:
        """Hand out the values of this recording that were computed."""
        if _is_written_since(session, first):
            return
        for position, out, tensor in _pending(session):
            cell = self._cells.get((position, out))
            if cell is not None and _is_same(session, self.foreseen, position):
                tensor._cell = cell
                if not tensor._requires_grad:
                    tensor._ref = None

    def serves(self, session: Session, first: FirstRead, loss: At) -> bool:
        """Whether these are the gradients of `loss`, and everything that is still to be computed is here."""
        if loss != self.foreseen.loss or not _is_same(session, self.foreseen, loss[0]):
            return False
        self.give(session, first)
        return not _is_written_since(session, first) and not _pending(session)


def _pending(session: Session) -> list[tuple[int, int, DeviceTensor]]:
    return [found for found in session.live() if found[2]._cell is None]


def _entry_at(entry: Entry | None, position: int) -> Entry | None:
    while entry is not None and entry.position > position:
        entry = entry.parent
    return entry if entry is not None and entry.position == position else None


def _is_same(session: Session, foreseen: Foreseen, position: int) -> bool:
    """Whether the operation at `position`, with all before it, is the one that was foreseen."""
    found = _entry_at(session.entry, position)
    return found is not None and found is _entry_at(foreseen.entry, position)


def _since(session: Session, first: FirstRead) -> list[Entry]:
    found: list[Entry] = []
    entry: Entry | None = session.entry
    while entry is not None and entry is not first.entry:
        found.append(entry)
        entry = entry.parent
    return found


def _is_written_since(session: Session, first: FirstRead) -> bool:
    return any(entry.writes for entry in _since(session, first))


def _recipe(recorder: Recorder, session: Session, first: FirstRead, foreseen: Foreseen) -> GradientsRecipe:
    axes = tuple(session.axes[: first.num_inputs])
    key = ("ahead", first.entry, first.wanted, foreseen.loss, foreseen.later, axes, first.num_models)
    recipe: GradientsRecipe | None = foreseen.entry.recipes.get(key)
    if recipe is None:
        path = path_to(foreseen.entry)
        models = tuple(session.models[: first.num_models])
        part = Part(tuple(path), float_inputs(path), models, 0, first.num_inputs, (), {}, None, False)
        wanted = [(0, *at) for at in (*first.wanted, *foreseen.later)]
        recipe = TapeRecipe(recorder, [part], (0, *foreseen.loss), wanted, axes).apart
        foreseen.entry.recipes[key] = recipe
    return recipe


def _foreseen(session: Session, first: FirstRead, loss: At) -> Foreseen | None:
    """The backward that comes now as one that could have been computed at the first read; None: it could not."""
    if session.externals or session.wanted or _is_written_since(session, first):
        return None
    wanted = first.later | {(position, out) for position, out, _ in _pending(session)}
    later = tuple(sorted(wanted - set(first.wanted)))
    last = max([first.entry.position, loss[0], *(position for position, _ in later)])
    entry = _entry_at(session.entry, last)
    assert entry is not None
    for one in _since(session, first):
        if one.position > last:
            continue
        if one.numbers is None:
            return None
        for leaf in operands_of(one):
            is_new_input = leaf[1] == "i" and leaf[2] >= first.num_inputs
            is_new_model = leaf[1] == "p" and leaf[2][0] >= first.num_models
            if is_new_input or is_new_model:
                return None
    return Foreseen(entry, loss, later)


# -- what the recorder asks for ------------------------------------------------------------------------------------------------


def read(recorder: Recorder, session: Session) -> bool:
    """A value of the recording is wanted. True: all values that are held were computed, ahead of their backward or before.

    False: the recorder has to compute them.
    """
    first: FirstRead | None = session.first_read
    if first is not None:
        if first.ahead is not None:
            first.ahead.give(session, first)
        still = {(position, out) for position, out, _ in _pending(session)}
        first.later |= still
        return not still
    if session.is_executed or session.externals or session.num_calls == 0 or _is_scaled(recorder):
        return False
    first = session.first_read = FirstRead(session)
    expected = first.site.expected()
    if expected is None:
        return False
    session.keep_start()
    first.ahead = Ahead(recorder, session, first, expected)
    first.site.is_open = True
    session.note_run(first.ahead.recipe.tape)
    first.ahead.give(session, first)
    return True


def _is_scaled(recorder: Recorder) -> bool:
    """What the loss of each process is multiplied by is known at backward: the scale of fp16, weights that differ between processes."""
    engine = recorder.engine
    is_weighted = recorder.num_processes > 1 and engine.gradient_state is not None and engine.gradient_state.weighs
    return is_weighted or engine.plan.precision.loss_scaling is not None


def backward(recorder: Recorder, session: Session, loss: DeviceTensor, *, retain_graph: bool) -> TorchCall | None:
    """The call that adds the gradients of `loss` where they were kept, or are now computed apart; None: they have to be computed.

    Notes what came after the first read of the recording, for the next step.
    """
    first: FirstRead | None = session.first_read
    if first is None:
        return None
    session.first_read = None  # a second backward of the same values is computed
    assert loss._ref is not None
    at = loss._ref.position, loss._ref.out
    site, ahead = first.site, first.ahead
    if _is_scaled(recorder):  # since the read
        if ahead is not None:
            site.missed()
        return None
    if ahead is not None:
        if ahead.serves(session, first, at):
            site.came_true()
            return _adding(session, ahead, retain_graph)
        site.missed()
    now = _foreseen(session, first, at)
    # The program that the next step will run at its read serves this one too, unless that would change buffers twice.
    call = None
    if now is not None and not session.writes_buffers and ahead is None:
        made = Ahead(recorder, session, first, now)
        if made.serves(session, first, at):
            call = _adding(session, made, retain_graph)
    session.after_backward = lambda: site.observe(now)
    return call


def _adding(session: Session, ahead: Ahead, retain_graph: bool) -> TorchCall:
    tape = ahead.recipe.tape
    session.refuse_changed_parameters(tape.used[0])
    held = [((0, position, out), weakref.ref(tensor)) for position, out, tensor in session.live()]
    inputs = [ahead.loss, *ahead.gradients]

    def finish(loss: Any, outputs: list[Any]) -> None:
        inputs.clear()  # the engine keeps the last call
        for place, ref in held:
            tensor = ref()
            if tensor is not None:
                release(tensor, place, tape, retain_graph=retain_graph)
        session.note_backward()

    return TorchCall(
        ahead.recipe.adding,
        handles(tape.models),
        inputs,
        [None] * len(inputs),
        finish,
        is_global=True,
        draw=session.draw,
    )
