"""Records what a training loop does with a model's outputs, so that forward, loss and backward become one compiled program.

Recordings form a tree (a trie): every step of a loop walks down the path that the step before made, one look-up per operation, and
finds shapes, structure and the compiled program there. An operation that was not seen before is tried on fake tensors once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import numpy as np
import torch

from polyaccel.errors import PrepareError, UnsupportedError

from . import foresight
from . import scope as capturing
from .calls import TorchCall, rebuild
from .changing_numbers import may_change, number_key
from .dispatch import NOT_RECORDED
from .dynamo import keep_out
from .forwards import Forwards
from .halves import Halves, Unfollowed, leaves_of_graph
from .modules import ManagedModel
from .own_values import OWN, OwnNumbers
from .packing import LEAF, Key, freeze_call
from .recordings import Entry, Floats, Ref, Session
from .shadows import Modes
from .tensors import DeviceParameter, DeviceTensor, cpp_grad_fn, tensors_in
from .trials import look_at_model, try_operation

if TYPE_CHECKING:
    from .guards import FunctionGuard

_log = logging.getLogger(__name__)
_MAX_CALLS = 32  # model calls in one recording; a loop that only looks at outputs is computed in parts of this size
# They have no gradient that could be lost.
_COMPARISONS = frozenset({torch.isclose, torch.allclose, torch.equal, torch.eq, torch.ne})
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
class Recorder:
    """One per bridge: the current recording, the trie, and the models that take part."""

    def __init__(self) -> None:
        self.models: list[ManagedModel] = []
        self.forwards = Forwards(self)
        self.halves = Halves(self)
        self._engine: Any = None
        self._root = Entry(None, None, None, Modes(True, None), ())
        self._seen: dict[Key, tuple[tuple[float, ...], Entry]] = {}
        self._session: Session | None = None
        self._closed: list[Session] = []  # ended ones whose values may still be wanted
        self._recaptures: dict[Any, int] = {}
        self._autocast: torch.dtype | None = None
        self._own_numbers: OwnNumbers | None = None

    # -- what it works for -------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        """The engine that runs the programs."""
        if self._engine is None:
            raise PrepareError("no model was prepared yet", "call accelerator.prepare(model, ...) first")
        return self._engine

    @property
    def num_processes(self) -> int:
        """Processes that have rows of their own: neighbours that share a data shard, and have the same rows, are one."""
        count: int = self.engine.topology.num_processes // self.engine.plan.num_processes_per_shard
        return count

    @property
    def process_index(self) -> int:
        """The place of this process among them."""
        place: int = self.engine.topology.process_index // self.engine.plan.num_processes_per_shard
        return place

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What prepared models compute in, beside float32."""
        return _AUTOCAST[self.engine.plan.precision.compute_dtype]

    def adopt(self, model: ManagedModel) -> None:
        """A model's values belong to the engine now."""
        self._engine = model.handle.engine
        self.models.append(model)
        keep_out()

    def use(self, engine: Any) -> None:
        """The engine, for values that come before the first model."""
        self._engine = self._engine or engine

    # -- recording -----------------------------------------------------------------------------------------------------------

    def record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of `func`, to be computed later; NOT_RECORDED where plain torch has to run it now.

        What a recording cannot follow goes on in plain torch, with gradients (see `halves`), and that is said once.
        """
        session = self._open()
        mark = session.mark()
        operands: list[DeviceTensor] = []
        numbers: list[float] = []
        modes = Modes.now()
        try:
            arguments = self._freeze_call(func, args, kwargs, session, operands, numbers, modes)
        except Unfollowed as found:
            session.rewind(mark)
            return self.halves.run(func, args, kwargs, found.reason)
        key = (func, modes, arguments)
        entry = self._find(session, key, numbers)
        if entry is None:
            entry = try_operation(session, key, tuple(numbers), operands)
        if entry.unfollowed is not None:
            session.rewind(mark)
            return self.halves.run(func, args, kwargs, entry.unfollowed)
        if entry.is_eager:
            session.rewind(mark)
            return NOT_RECORDED
        if entry.value is not None:
            session.rewind(mark)
            return entry.value[0]
        self._enter_numbers(session, entry, numbers)
        return self._append(session, entry, operands)

    def call_model(self, model: ManagedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a prepared model gives: recorded where gradients or recorded values are involved, else computed at once."""
        keep_out()
        token = model.guard.token()
        modes = Modes.now()
        tensors = tensors_in((*args, *kwargs.values()))
        needs_grad = modes.is_grad_enabled and (bool(token.trainable) or any(t.requires_grad for t in tensors))
        if not needs_grad and not any(isinstance(t, DeviceTensor) and t._cell is None for t in tensors):
            self.settle_effects(model, "buffers")
            return self.forwards.call(model, token, modes, args, kwargs)
        session = self._open()
        if session.is_executed or session.num_calls >= _MAX_CALLS:
            self._close(session)
            session = self._open()
        operands: list[DeviceTensor] = []
        numbers: list[float] = []
        index = session.model_index(model)
        if session.batch_size is None:
            first = next((t for t in tensors if t.dim()), None)
            session.batch_size = None if first is None else first.shape[0]
        try:
            arguments = self._freeze_call(None, args, kwargs, session, operands, numbers, modes)
        except Unfollowed as found:
            raise PrepareError(
                f"{type(model.module).__name__} was called with what plain torch computed from a prepared model's output, because"
                f" {found.reason or 'a recording could not follow'}: gradients would stop there",
                "compute it inside the model, use another operation, or detach() it",
            ) from None
        key = ((model, token, index), modes, arguments)
        entry = self._find(session, key, numbers)
        if entry is None:
            entry = look_at_model(self, session, model, token, key, tuple(numbers))
        self._enter_numbers(session, entry, numbers)
        session.num_calls += 1
        session.writes_params = session.writes_params or entry.writes_params
        changes_buffers = token.is_training and bool(model.handle.buffers)
        session.has_effects = session.has_effects or changes_buffers or entry.writes_params
        entry.effects.apply()
        return self._append(session, entry, operands)

    def _enter_numbers(self, session: Session, entry: Entry, numbers: list[float]) -> None:
        if entry.numbers is None:
            how = entry.changing
            assert how is not None
            for value in numbers:
                number = how.array(value)
                if entry.model is None and session.own_copies is not None:
                    session.add(self._own_number(number), OWN)
                else:
                    session.add(number, None)

    def _open(self) -> Session:
        for model in self.models:
            if model.touched:
                model.push_writes()  # ends the recording where parameters were written to
        session = self._session
        if session is None:
            copies = None if self.num_processes == 1 else self.engine.plan.num_local_data_shards
            session = self._session = Session(self._root, self.engine.current_key()[1], self._seen, copies)
        return session

    def _freeze_call(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        session: Session,
        operands: list[DeviceTensor],
        numbers: list[float],
        modes: Modes,
    ) -> Key:
        def tensor(found: torch.Tensor) -> Key:
            operands.append(found)  # type: ignore[arg-type]  # plain tensors too: positions count
            if isinstance(found, DeviceTensor):
                if found._recorder is not self:
                    raise PrepareError(
                        "a value of another Accelerator's model was used", "use one Accelerator per script"
                    )
                ref = found._ref
                if not found._requires_grad and modes.is_grad_enabled:
                    custom = cpp_grad_fn(found)
                    if custom is not None:
                        raise Unfollowed(f"{custom.name().removesuffix('Backward')} has a backward of its own")
                if ref is not None and ref.session is session:
                    return (LEAF, "r", ref.position, ref.out, found._cell is not None)
                if ref is not None and found._requires_grad and modes.is_grad_enabled:
                    return self._external(session, found)
                if isinstance(found, DeviceParameter):
                    model: ManagedModel = found._cell._model
                    index = session.model_index(model)
                    place = (index, found._cell.name)
                    return (LEAF, "p", place, found._dtype, found._shape, found._requires_grad)
                if found._cell is None:
                    self.compute(found)
                index, axis = session.input(found, for_model=func is None)
                is_spent = found._is_spent and found._requires_grad
                return (LEAF, "i", index, found._dtype, found._shape, is_spent, axis)
            if found.requires_grad and modes.is_grad_enabled and func not in _COMPARISONS:
                if self.halves.computed(found):
                    raise Unfollowed(None)
                self._refuse_foreign(found)
                index, axis = session.input(found, wants_grad=True, for_model=func is None)
                return (LEAF, "i", index, found.dtype, found.shape, True, axis, True)
            index, axis = session.input(found, for_model=func is None)
            return (LEAF, "i", index, found.dtype, found.shape, False, axis)

        def number(value: float) -> Key:
            numbers.append(value)
            return (LEAF, "f", len(numbers) - 1, type(value))

        return freeze_call(args, kwargs, tensor, number, lifts=may_change(func))

    def _refuse_foreign(self, tensor: torch.Tensor) -> None:
        """An input whose gradient is wanted gets it; a parameter that nobody prepared is a mistake."""
        for leaf in leaves_of_graph(tensor):
            if isinstance(leaf, torch.nn.Parameter):
                capturing.refuse_foreign(leaf)
        if self.num_processes > 1:
            raise UnsupportedError(
                f"a tensor of shape {tuple(tensor.shape)} that requires grad is given to a prepared model in a job of several processes",
                "compute the gradient inside a loss function: requires_grad_() and torch.autograd.grad in"
                " accelerator.backward(loss_fn, model, batch)",
            )

    def _external(self, session: Session, tensor: DeviceTensor) -> Key:
        index = next((index for index, found in enumerate(session.externals) if found is tensor), None)
        if index is None:
            session.externals.append(tensor)
            index = len(session.externals) - 1
        return (LEAF, "x", index, tensor._dtype, tensor._shape, True)

    def _find(self, session: Session, key: Key, numbers: list[float]) -> Entry | None:
        found = session.entry.children.get(key)
        if type(found) is Floats:
            return found.dynamic or found.variants.get(number_key(tuple(numbers)))
        return found

    def _append(self, session: Session, entry: Entry, operands: list[DeviceTensor]) -> Any:
        position = entry.position
        session.entry = entry
        if session.shadows is not None and session.shadows.position < position:
            session.shadows.follow(entry)
        made: list[DeviceTensor] = []
        for out, spec in enumerate(entry.specs):
            same = entry.same.get(out)
            if same is not None:
                made.append(operands[same])
            else:
                ref = Ref(session, position, out)
                made.append(DeviceTensor.make(self, spec.shape, spec.dtype, requires_grad=spec.requires_grad, ref=ref))
        if entry.writes:
            for _, _, tensor in session.live():
                tensor._cell = None  # it, or a view of it, has another value now
        for operand, spec in entry.updates:
            changed = operands[operand]
            changed._shape, changed._dtype, changed._requires_grad = spec
        session.results.append([weakref.ref(tensor) for tensor in made])
        return rebuild(entry.structure, made.__getitem__)

    # -- values ----------------------------------------------------------------------------------------------------------------

    def compute(self, tensor: DeviceTensor) -> None:
        """Give a recorded tensor its value, and with it all others of its recording that are still held."""
        ref = tensor._ref
        if ref is None:
            raise RuntimeError("this tensor's value was not kept: its recording was dropped")
        if not foresight.read(self, ref.session):
            self._execute(ref.session)
        if tensor._cell is None:
            raise RuntimeError("this tensor's value could not be computed")

    def settle(self) -> None:
        """Compute everything recorded that somebody may still look at: parameters or buffers are about to change."""
        if self._session is not None:
            self._close(self._session)
        closed, self._closed = self._closed, []
        for session in closed:
            if session.has_pending():
                self._execute(session)

    def settle_effects(self, model: ManagedModel, kind: str) -> None:
        """Run recorded calls of a model that change its buffers or parameters, before somebody looks at them."""
        session = self._session
        if session is None or kind == "grads" or not session.has_effects or session.is_executed:
            return
        if kind == "params" and not session.writes_params:
            return
        if model in session.models:
            self._execute(session)

    def _execute(self, session: Session) -> None:
        from .tape_calls import value_call

        session.keep_start()
        call = value_call(self, session)
        self.engine.run_forward(call)
        session.note_run(call.signature)

    def _close(self, session: Session) -> None:
        """End a recording. Its model calls run if they change buffers; values that are still held wait for `settle`."""
        is_long = session.num_calls >= _MAX_CALLS and session.has_pending()
        if (session.has_effects and not session.is_executed) or is_long:
            self._execute(session)
        elif session.has_pending():
            self._closed = [one for one in self._closed if one.has_pending()]
            self._closed.append(session)
        session.shadows = None
        if self._session is session:
            self._session = None

    # -- gradients ---------------------------------------------------------------------------------------------------------------

    def lower_loss(self, loss: torch.Tensor, *, retain_graph: bool = False, scale: float = 1.0) -> TorchCall:
        """A recorded loss as a program call that gives the gradients of all trainable parameters it depends on.

        With `retain_graph` its values can be differentiated again. Inputs that want a gradient get `scale` times theirs.
        """
        from .tape_calls import loss_call

        if loss.requires_grad and not isinstance(loss, DeviceTensor) and self.halves.computed(loss):
            return self.halves.lower(loss, retain_graph, scale)
        if isinstance(loss, DeviceTensor) and not loss._requires_grad and cpp_grad_fn(loss) is not None:
            return self.halves.lower(loss, retain_graph, scale)
        session, loss = self._differentiable(loss)
        call = foresight.backward(self, session, loss, retain_graph=retain_graph)
        if call is None:
            call = loss_call(self, loss, retain_graph=retain_graph, scale=scale)
        self._end(session)
        return call

    def _differentiable(self, loss: torch.Tensor) -> tuple[Session, DeviceTensor]:
        """A loss that is about to be differentiated, with its recording. Raises where that cannot be."""
        if not isinstance(loss, DeviceTensor) or (loss._ref is None and not loss._is_spent):
            raise PrepareError(
                f"the loss, a tensor of shape {tuple(loss.shape)}, was not computed from a prepared model's output with gradients",
                "call the model that accelerator.prepare returned, outside torch.no_grad() and without detach(),"
                " and give its loss to accelerator.backward",
            )
        if loss._ref is None:
            raise RuntimeError(SECOND)
        if loss.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if not loss._requires_grad:
            raise PrepareError(
                "the loss depends on no trainable parameter of the prepared models",
                "compute it outside torch.no_grad(), and leave some requires_grad on",
            )
        for model in self.models:
            model.push_writes()
        session = loss._ref.session
        if session is not self._session:
            self.settle()
        return session, loss

    def _end(self, session: Session) -> None:
        session.shadows = None
        if self._session is session:
            self._session = None

    def gradients(
        self, loss: torch.Tensor, inputs: Sequence[torch.Tensor], *, retain_graph: bool = False
    ) -> list[torch.Tensor | None]:
        """`torch.autograd.grad(loss, inputs)` of a recorded scalar; None for an input that it does not depend on."""
        from .input_gradients import gradients_of

        session, recorded = self._differentiable(loss)
        found = gradients_of(self, recorded, inputs, retain_graph=retain_graph)
        self._end(session)
        return found

    def backward(self, loss: DeviceTensor, *, retain_graph: bool = False) -> None:
        """`loss.backward()`."""
        self.engine.backward(self.lower_loss(loss, retain_graph=retain_graph), scale=1.0)

    def is_recording(self, session: Session) -> bool:
        """Whether a recording is the present one."""
        return session is self._session

    def become(self, target: torch.Tensor, result: DeviceTensor) -> None:
        """Make a plain tensor object what `result` is: lists and attributes that hold it see the new value."""
        ref = result._ref
        assert ref is not None
        refs = ref.session.results[ref.position]
        refs[ref.out] = _DEAD
        torch.utils.swap_tensors(target, result)
        refs[ref.out] = weakref.ref(target)  # type: ignore[arg-type]  # it is one now

    def _own_number(self, number: Any) -> Any:
        if self._own_numbers is None:
            self._own_numbers = OwnNumbers(self.engine.place, self.engine.plan.num_local_data_shards)
        return self._own_numbers(number)

    def draw_key(self, draw: int) -> Any:
        """The data of the random key of one draw."""
        return jax.random.key_data(jax.random.fold_in(self.engine.current_key()[0], np.uint32(draw)))

    # -- once said -----------------------------------------------------------------------------------------------------------------

    def note_recapture(self, guard: FunctionGuard, values: list[Any]) -> None:
        """Say once what makes a function be captured again and again."""
        count = self._recaptures[guard.code] = self._recaptures.get(guard.code, 0) + 1
        if count == 8:
            name = getattr(guard.code, "co_name", "the function")
            _log.warning(
                "%s was captured and compiled %d times because %s changes from call to call; pass it as a tensor",
                name,
                count,
                values,
            )


class _Nothing:
    """Something to have a dead reference to."""


_DEAD: Any = weakref.ref(_Nothing())
SECOND = (
    "Trying to backward through the graph a second time: the recorded computation was freed by accelerator.backward."
    " Call the model again, or add the losses and call backward once."
)
