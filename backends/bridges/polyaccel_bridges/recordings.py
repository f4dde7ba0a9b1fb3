"""What a recording is made of: the trie of operations, the path of one step in it, and the fakes that new operations are tried on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from .attributes import NO_EFFECTS
from .changing_numbers import Changing, Numbers
from .exchange import placed_array
from .modules import ManagedModel
from .own_values import OWN, is_own, laid
from .packing import Key, thaw
from .shadows import Fakes, Modes, OutSpec, fake_leaf, freeze_result, spec_of
from .tensors import ArrayCell, DeviceTensor, host_copy

if TYPE_CHECKING:
    from .tape_calls import TapeRecipe


class Ref(NamedTuple):
    """A place in a recording: output `out` of the operation at `position`."""

    session: Session
    position: int
    out: int


@final
class Entry:
    """One recorded operation or model call after a certain sequence of others: a node of the trie."""

    __slots__ = (
        "arguments", "changing", "children", "effects", "func", "gives_view", "is_eager", "model", "modes", "numbers", "parent",
        "position", "recipes", "same", "site", "specs", "structure", "token", "unfollowed", "updates", "value", "writes", "writes_params",
    )  # fmt: skip

    def __init__(self, parent: Entry | None, func: Any, arguments: Key, modes: Modes, numbers: Numbers | None) -> None:
        self.parent = parent
        self.position: int = -1 if parent is None else parent.position + 1
        self.func = func
        self.arguments = arguments
        self.modes = modes
        self.numbers = numbers  # constants of the program; None: they are inputs, as `changing` says
        self.changing: Changing | None = None
        self.effects = NO_EFFECTS  # what a model call does to Python attributes
        self.unfollowed: str | None = None  # why torch has to run it, with gradients if they are wanted
        self.model: ManagedModel | None = None
        self.token: Any = None
        self.structure: Key = None
        self.specs: list[OutSpec] = []
        self.same: dict[int, int] = {}  # outputs that are operands themselves -> which
        self.updates: list[tuple[int, OutSpec]] = []  # operands whose metadata the operation changes
        self.writes: tuple[int, ...] = ()  # operands that it writes to
        self.writes_params = False  # a model call that writes to parameters in place
        self.gives_view = False
        self.value: Any = None  # what an operation without tensors in its result gives
        self.is_eager = False  # plain torch runs it
        self.children: dict[Key, Entry | Floats] = {}
        self.recipes: dict[Key, Any] = {}
        self.site: Any = None  # what followed where a value was read after this operation, see foresight.py


def path_to(entry: Entry | None) -> list[Entry]:
    """All operations up to this one, in order."""
    entries: list[Entry] = []
    while entry is not None and entry.parent is not None:
        entries.append(entry)
        entry = entry.parent
    return entries[::-1]


@final
class Floats:
    """The entries of one operation that differ in their Python numbers."""

    __slots__ = ("dynamic", "variants")

    def __init__(self) -> None:
        self.variants: dict[tuple[Any, ...], Entry] = {}  # by number_key
        self.dynamic: Entry | None = None


@final
class Session:
    """One recording: a path in the trie, and the values that entered it."""

    def __init__(
        self, root: Entry, draw: int, seen: dict[Key, tuple[Numbers, Entry]], own_copies: int | None = None
    ) -> None:
        self.entry = root
        self.own_copies = own_copies  # of host values that processes have differently; None: there is one process
        self.seen = seen  # by place and key: the first numbers of an operation, whatever came before it
        self.draw = draw
        self.inputs: list[Any] = []
        self.axes: list[int | None] = []
        self.models: list[ManagedModel] = []
        self.results: list[list[weakref.ref[DeviceTensor]]] = []
        self.externals: list[DeviceTensor] = []  # values of older recordings that still need gradients
        self.wanted: dict[int, torch.Tensor] = {}  # inputs of user code that want a gradient
        self.batch_size: int | None = None
        self.num_calls = 0
        self.has_effects = False  # a model call may have changed buffers, or parameters
        self.writes_params = False
        self.is_executed = False  # its model calls ran, for the sake of their values
        self.start_buffers: dict[
            ManagedModel, dict[str, Any]
        ] = {}  # what the first run of its model calls started from
        self.start_params: list[Mapping[str, Any]] = []
        self.first_read: Any = None  # when a value was wanted first, and what was done for it: see foresight.py
        self.writes_buffers = False  # the run that gave values changed buffers, or parameters
        self.written_params: dict[tuple[ManagedModel, str], Any] = {}  # what forward made of parameters
        self.after_backward: Callable[[], None] | None = None
        self.shadows: Shadows | None = None
        self._inputs: dict[tuple[int, Any, bool, bool], int] = {}
        self._kept: list[Any] = []

    def input(
        self, tensor: torch.Tensor, *, wants_grad: bool = False, for_model: bool = False
    ) -> tuple[int, int | None]:
        """The index of a tensor among the inputs, and its batch dim; its present value is what enters.

        Without a batch dim a prepared model takes it as the same for all data shards; other operations take each process's own.
        """
        version: Any = 0
        if isinstance(tensor, DeviceTensor):
            version = tensor._cell.stamp()
        elif not tensor.is_inference():
            version = tensor._version
        found = self._inputs.get((id(tensor), version, wants_grad, for_model))
        if found is not None:
            return found, self.axes[found]
        value: Any
        axis: int | None
        if isinstance(tensor, DeviceTensor):
            cell = tensor._cell
            value, axis = cell.feed_recording() if type(cell) is ArrayCell else cell.feed()
        else:
            value, axis = placed_array(tensor), 0
            if value is None:
                value = host_copy(tensor)
                axis = 0 if tensor.dim() and tensor.shape[0] == self.batch_size else None
            elif not tensor.dim():
                axis = None
        if axis == 0 and self.batch_size is None:
            self.batch_size = tensor.shape[0]
        if self.own_copies is not None and not for_model and is_own(value, axis):
            value, axis = laid(value, self.own_copies), OWN
        self._kept.append(tensor)
        self._inputs[id(tensor), version, wants_grad, for_model] = len(self.inputs)
        if wants_grad:
            self.wanted[len(self.inputs)] = tensor
        return self.add(value, axis), axis

    def add(self, value: Any, axis: int | None) -> int:
        """A further input; returns its index."""
        self.inputs.append(value)
        self.axes.append(axis)
        return len(self.inputs) - 1

    def mark(self) -> tuple[int, int, int, int]:
        """The present extent, for `rewind`."""
        return len(self.inputs), len(self.models), len(self.externals), len(self._kept)

    def rewind(self, mark: tuple[int, int, int, int]) -> None:
        """Forget what was added since `mark`."""
        inputs, models, externals, kept = mark
        if len(self.inputs) > inputs:
            self._inputs = {key: index for key, index in self._inputs.items() if index < inputs}
            self.wanted = {index: tensor for index, tensor in self.wanted.items() if index < inputs}
        del (
            self.inputs[inputs:],
            self.axes[inputs:],
            self.models[models:],
            self.externals[externals:],
            self._kept[kept:],
        )
        del self.start_params[models:]

    def model_index(self, model: ManagedModel) -> int:
        """The index of a model of this recording."""
        for index, found in enumerate(self.models):
            if found is model:
                return index
        self.models.append(model)
        self.start_params.append(model.handle.params)
        return len(self.models) - 1

    def path(self) -> list[Entry]:
        """All entries, in order."""
        return path_to(self.entry)

    def live(self) -> list[tuple[int, int, DeviceTensor]]:
        """Every recorded value that user code still holds."""
        found = []
        for position, refs in enumerate(self.results):
            for out, ref in enumerate(refs):
                tensor = ref()
                at = None if tensor is None else tensor._ref
                if tensor is not None and at is not None and (at.session, at.position, at.out) == (self, position, out):
                    found.append((position, out, tensor))
        return found

    def keep_start(self) -> None:
        """Its operations are about to run: where they write buffers, a further run has to start from the present ones."""
        if not self.is_executed:
            self.start_buffers = {model: dict(model.handle.buffers) for model in self.models}

    def note_run(self, recipe: TapeRecipe) -> None:
        """Its operations ran, and what forward writes to in place has its new value."""
        self.is_executed = True
        self.writes_buffers = self.writes_buffers or recipe.writes_buffers
        for model in self.models if recipe.written_params else ():
            prefix = f"{model.handle.name}."
            names = [name.removeprefix(prefix) for name in recipe.written_params if name.startswith(prefix)]
            self.written_params.update({(model, name): model.handle.params[name] for name in names})

    def note_backward(self) -> None:
        """A backward of one of its values has run."""
        after, self.after_backward = self.after_backward, None
        if after is not None:
            after()

    def has_pending(self) -> bool:
        """Whether user code holds a value that was not computed yet."""
        return any(tensor._cell is None for _, _, tensor in self.live())

    def refuse_changed_parameters(self, used: frozenset[int]) -> None:
        """Raise, as torch does, where parameters of the used models changed since."""
        for index in used:
            model, before = self.models[index], self.start_params[index]
            now = model.handle.params
            if now is not before and any(
                now[name] is not value and now[name] is not self.written_params.get((model, name))
                for name, value in before.items()
            ):
                raise RuntimeError(
                    f"a parameter of {type(model.module).__name__} was changed (by an optimizer step or a write) after a forward"
                    " pass whose gradients are still wanted: call accelerator.backward before the change"
                )


@final
class Shadows:
    """Fake tensors for every value of a recording: what a new operation gives is tried on them."""

    def __init__(self, session: Session) -> None:
        self.fakes = Fakes()
        self.env: dict[tuple[int, int], torch.Tensor] = {}
        self.position = -1  # the last entry that was followed
        self._leaves: dict[Key, torch.Tensor] = {}
        for entry in session.path():
            self.follow(entry)

    def follow(self, entry: Entry) -> None:
        """Bring the shadows to after `entry`."""
        if entry.model is not None:
            with self.fakes.active(), torch.enable_grad():
                made = [fake_leaf(spec) for spec in entry.specs]
                tensors = [tensor.clone() if tensor.requires_grad else tensor for tensor in made]
        else:
            with self.fakes.active(), entry.modes.active():
                args, kwargs = thaw(entry.arguments, lambda described: self.leaf(described, entry))
                _, tensors = freeze_result(entry.func(*args, **kwargs))
        self.keep(entry.position, tensors)

    def keep(self, position: int, tensors: list[torch.Tensor]) -> None:
        """Note the results at `position`."""
        self.position = position
        for out, tensor in enumerate(tensors):
            self.env[position, out] = tensor

    def leaf_spec(self, described: tuple[Any, ...]) -> OutSpec:
        """What is known of an operand now."""
        if described[1] == "r":
            return spec_of(self.env[described[2], described[3]])
        return OutSpec(described[4], described[3], described[5])

    def leaf(self, described: tuple[Any, ...], entry: Entry) -> Any:
        """The fake of an operand; call it inside the fake mode."""
        kind = described[1]
        if kind == "r":
            return self.env[described[2], described[3]]
        if kind == "f":
            if entry.numbers is not None:
                return entry.numbers[described[2]]
            assert entry.changing is not None
            return entry.changing.example
        found = self._leaves.get(described)
        if found is None:
            dtype, shape, requires_grad = described[3:6]
            found = self._leaves[described] = fake_leaf(OutSpec(shape, dtype, requires_grad))
        return found
