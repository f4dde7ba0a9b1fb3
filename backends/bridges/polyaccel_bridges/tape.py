"""Records what a training loop does with a model's outputs, so that forward, loss and backward become one compiled program.

Recordings form a tree (a trie): every step of a loop walks down the path that the step before made, one look-up per operation, and
finds shapes, structure and the compiled program there. An operation that was not seen before is tried on fake tensors once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import jax
import numpy as np
import torch

from polyaccel.errors import PrepareError

from . import scope as capturing
from .calls import TorchCall, rebuild
from .dispatch import NOT_RECORDED, is_inplace_name
from .forwards import Forwards
from .modules import ManagedModel
from .packing import LEAF, Key, freeze, settle, thaw
from .recordings import Entry, Floats, Ref, Session, Shadows
from .shadows import Modes, OutSpec, ValueDependent, freeze_result, infer, spec_of
from .tensors import DeviceParameter, DeviceTensor, refuse_custom_function, refuse_shape, tensors_in

if TYPE_CHECKING:
    from .guards import FunctionGuard

_log = logging.getLogger(__name__)
_MAX_CALLS = 32  # model calls in one recording; a loop that only looks at outputs is computed in parts of this size
_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_T = torch.Tensor
# Where a Python float that changes from step to step may become an input of the program.
_ARITHMETIC = frozenset(
    {
        _T.__add__, _T.__radd__, _T.__sub__, _T.__rsub__, _T.__mul__, _T.__rmul__, _T.__truediv__, _T.__rtruediv__,
        _T.add, _T.sub, _T.mul, _T.div, torch.add, torch.sub, torch.mul, torch.div, _T.__iadd__, _T.__imul__,
    }
)  # fmt: skip


@final
class Recorder:
    """One per bridge: the current recording, the trie, and the models that take part."""

    def __init__(self) -> None:
        self.models: list[ManagedModel] = []
        self.forwards = Forwards(self)
        self._engine: Any = None
        self._root = Entry(None, None, None, Modes(True, None), ())
        self._session: Session | None = None
        self._closed: list[Session] = []  # ended ones whose values may still be wanted
        self._recaptures: dict[Any, int] = {}
        self._autocast: torch.dtype | None = None

    # -- what it works for -------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        """The engine that runs the programs."""
        if self._engine is None:
            raise PrepareError("no model was prepared yet", "call accelerator.prepare(model, ...) first")
        return self._engine

    @property
    def num_processes(self) -> int:
        """Processes of the job."""
        count: int = self.engine.topology.num_processes
        return count

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What prepared models compute in, beside float32."""
        return _AUTOCAST[self.engine.plan.precision.name]

    def adopt(self, model: ManagedModel) -> None:
        """A model's values belong to the engine now."""
        self._engine = model.handle.engine
        self.models.append(model)

    def use(self, engine: Any) -> None:
        """The engine, for values that come before the first model."""
        self._engine = self._engine or engine

    # -- recording -----------------------------------------------------------------------------------------------------------

    def record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of `func`, to be computed later; NOT_RECORDED where plain torch has to run it now."""
        session = self._open()
        mark = session.mark()
        operands: list[DeviceTensor] = []
        numbers: list[float] = []
        modes = Modes.now()
        arguments = self._freeze((args, dict(kwargs)), session, operands, numbers, modes)
        key = (func, modes, arguments)
        entry = self._find(session, key, tuple(numbers))
        if entry is None:
            entry = self._try(session, key, tuple(numbers), operands)
        if entry.is_eager:
            session.rewind(mark)
            return NOT_RECORDED
        if entry.value is not None:
            session.rewind(mark)
            return entry.value[0]
        if entry.numbers is None:
            for value in numbers:
                session.add(np.float32(value), None)
        return self._append(session, entry, operands)

    def call_model(self, model: ManagedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a prepared model gives: recorded where gradients or recorded values are involved, else computed at once."""
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
        arguments = self._freeze((args, dict(kwargs)), session, operands, numbers, modes)
        key = ((model, token, index), modes, arguments)
        entry = self._find(session, key, tuple(numbers))
        if entry is None:
            entry = self._look_at_model(session, model, token, key, tuple(numbers))
        session.num_calls += 1
        session.has_effects = session.has_effects or (token.is_training and bool(model.handle.buffers))
        return self._append(session, entry, operands)

    def _open(self) -> Session:
        for model in self.models:
            if model.touched:
                model.push_writes()  # ends the recording where parameters were written to
        session = self._session
        if session is None:
            session = self._session = Session(self._root, self.engine.current_key()[1])
        return session

    def _freeze(
        self, tree: Any, session: Session, operands: list[DeviceTensor], numbers: list[float], modes: Modes
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
                    refuse_custom_function(found)
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
                index, axis = session.input(found)
                is_spent = found._is_spent and found._requires_grad
                return (LEAF, "i", index, found._dtype, found._shape, is_spent, axis)
            if found.requires_grad and modes.is_grad_enabled:
                capturing.refuse_foreign(found)
            index, axis = session.input(found)
            return (LEAF, "i", index, found.dtype, found.shape, False, axis)

        def number(value: float) -> Key:
            numbers.append(value)
            return (LEAF, "f", len(numbers) - 1)

        return freeze(tree, tensor, number)

    def _external(self, session: Session, tensor: DeviceTensor) -> Key:
        index = next((index for index, found in enumerate(session.externals) if found is tensor), None)
        if index is None:
            session.externals.append(tensor)
            index = len(session.externals) - 1
        return (LEAF, "x", index, tensor._dtype, tensor._shape, True)

    def _find(self, session: Session, key: Key, numbers: tuple[float, ...]) -> Entry | None:
        found = session.entry.children.get(key)
        if type(found) is Floats:
            return found.dynamic or found.variants.get(numbers)
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
        for operand, spec in entry.updates:
            changed = operands[operand]
            changed._shape, changed._dtype, changed._requires_grad = spec
        session.results.append([weakref.ref(tensor) for tensor in made])
        return rebuild(entry.structure, made.__getitem__)

    # -- operations not seen before ------------------------------------------------------------------------------------------

    def _add(self, session: Session, entry: Entry, key: Key, numbers: tuple[float, ...]) -> Entry:
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
            floats.variants[numbers] = entry
        return entry

    def _try(self, session: Session, key: Any, numbers: tuple[float, ...], operands: list[DeviceTensor]) -> Entry:
        func, modes, arguments = key
        known = session.entry.children.get(key)
        is_changed = type(known) is Floats and bool(known.variants) and func in _ARITHMETIC
        entry = Entry(session.entry, func, settle(arguments), modes, None if is_changed else numbers)
        if session.shadows is None:
            session.shadows = Shadows(session)
        shadows = session.shadows
        described: list[tuple[Any, ...]] = []

        def leaf(found: tuple[Any, ...]) -> Any:
            fake = shadows.leaf(found, entry.numbers)
            if found[1] != "f":
                described.append(found)
                fakes.append(fake)
            return fake

        fakes: list[torch.Tensor] = []
        with shadows.fakes.active(), modes.active():
            args, kwargs = thaw(arguments, leaf)
            before = [(fake._version, spec_of(fake)) for fake in fakes]
            try:
                result = func(*args, **kwargs)
            except ValueDependent:
                result = NOT_RECORDED
            except Exception:
                session.shadows = None  # they may have been written to
                raise
        if result is NOT_RECORDED:
            session.shadows = None
            return self._add(session, self._by_value(entry, operands), key, numbers)
        structure, tensors = freeze_result(result)
        entry.writes = tuple(
            i for i, (fake, old) in enumerate(zip(fakes, before, strict=True)) if fake._version != old[0]
        )
        entry.gives_view = any(tensor._is_view() for tensor in tensors)
        is_written = bool(entry.writes)
        if not tensors and not is_written:
            entry.value = (result,)
        available = all(operand._cell is not None for operand in operands if isinstance(operand, DeviceTensor))
        if tensors and not is_written and available and not any(tensor.requires_grad for tensor in tensors):
            entry.is_eager = True
        entry.structure, entry.specs = structure, [spec_of(tensor) for tensor in tensors]
        for out, tensor in enumerate(tensors):
            for operand, fake in enumerate(fakes):
                if tensor is fake:
                    entry.same[out] = operand
        for operand, (fake, old) in enumerate(zip(fakes, before, strict=True)):
            if spec_of(fake) != old[1]:
                entry.updates.append((operand, spec_of(fake)))
        if is_written and available and all(described[index][1] == "p" for index in entry.writes):
            entry.is_eager = True  # torch.nn.init and its like: they write to parameters under their own no_grad
        elif is_written:
            self._refuse_written_inputs(func, described, entry.writes)
        if entry.value is None and not entry.is_eager:
            shadows.keep(entry.position, tensors)
        return self._add(session, entry, key, numbers)

    def _refuse_written_inputs(self, func: Any, described: list[Any], writes: tuple[int, ...]) -> None:
        for leaf in (described[index] for index in writes):
            if leaf[1] != "r":
                raise PrepareError(
                    f"{getattr(func, '__name__', func)} writes a value that a model computed into a tensor of shape"
                    f" {tuple(leaf[4])} that is no part of the recorded computation",
                    "use the operation that returns a new tensor instead of the one that writes in place",
                )

    def _by_value(self, entry: Entry, operands: list[DeviceTensor]) -> Entry:
        """For an operation whose result's shape needs values: plain torch runs it, if no gradient has to pass."""
        if entry.modes.is_grad_enabled and any(operand.requires_grad for operand in operands):
            with torch.enable_grad():
                examples = {
                    id(o): torch.ones(o.shape, dtype=o.dtype).requires_grad_(
                        o.requires_grad and o.dtype.is_floating_point
                    )
                    for o in operands
                }
                iterator = iter([examples[id(operand)] for operand in operands])
                numbers = entry.numbers or ()
                args, kwargs = thaw(entry.arguments, lambda d: numbers[d[2]] if d[1] == "f" else next(iterator))
                is_inplace = is_inplace_name(getattr(entry.func, "__name__", ""))
                _, tensors = freeze_result(None if is_inplace else entry.func(*args, **kwargs))
            if is_inplace or any(tensor.requires_grad for tensor in tensors):
                raise refuse_shape(entry.func)
        entry.is_eager = True
        return entry

    def _look_at_model(
        self, session: Session, model: ManagedModel, token: Any, key: Any, numbers: tuple[float, ...]
    ) -> Entry:
        _, modes, arguments = key
        entry = Entry(session.entry, None, settle(arguments), modes, numbers)
        entry.model, entry.token = model, token
        places: list[Key] = []
        specs: list[OutSpec] = []

        def collect(found: tuple[Any, ...]) -> Any:
            if found[1] != "f" and found[:4] not in places:
                places.append(found[:4])
                specs.append(self._operand_spec(session, found))
            return None

        thaw(arguments, collect)

        def run(leaves: Any) -> Any:
            def leaf(found: tuple[Any, ...]) -> Any:
                return numbers[found[2]] if found[1] == "f" else leaves[places.index(found[:4])]

            args, kwargs = thaw(arguments, leaf)
            scope = capturing.CaptureScope([model.prepared], self.autocast_dtype)  # type: ignore[list-item]
            with scope.active():
                return scope.call(model.prepared, args, kwargs)  # type: ignore[arg-type]

        entry.structure, entry.specs = infer({model.handle.name: model.module}, run, specs, modes)
        return self._add(session, entry, key, numbers)

    def _operand_spec(self, session: Session, found: tuple[Any, ...]) -> OutSpec:
        if found[1] == "r":
            path = session.path()
            return path[found[2]].specs[found[3]]
        return OutSpec(found[4], found[3], found[5])

    # -- values ----------------------------------------------------------------------------------------------------------------

    def compute(self, tensor: DeviceTensor) -> None:
        """Give a recorded tensor its value, and with it all others of its recording that are still held."""
        ref = tensor._ref
        if ref is None:
            raise RuntimeError("this tensor's value was not kept: its recording was dropped")
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
        """Run recorded calls of a model that change its buffers, before somebody looks at them."""
        session = self._session
        if session is None or kind != "buffers" or not session.has_effects or session.is_executed:
            return
        if model in session.models:
            self._execute(session)

    def _execute(self, session: Session) -> None:
        from .tape_calls import value_call

        if session.has_effects and not session.is_executed:
            session.start_buffers = {model: dict(model.handle.buffers) for model in session.models}
        call = value_call(self, session)
        self.engine.run_forward(call)
        session.is_executed = True
        session.num_executed = len(session.results)

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

    def lower_loss(self, loss: torch.Tensor) -> TorchCall:
        """A recorded loss as a program call that gives the gradients of all trainable parameters it depends on."""
        from .tape_calls import loss_call

        if not isinstance(loss, DeviceTensor) or (loss._ref is None and not loss._is_spent):
            raise PrepareError(
                f"the loss, a tensor of shape {tuple(loss.shape)}, was not computed from a prepared model's output with gradients",
                "call the model that accelerator.prepare returned, outside torch.no_grad() and without detach(),"
                " and give its loss to accelerator.backward",
            )
        if loss._ref is None:
            raise RuntimeError(_SECOND)
        if loss.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if not loss._requires_grad:
            refuse_custom_function(loss)
            raise PrepareError(
                "the loss depends on no trainable parameter of the prepared models",
                "compute it outside torch.no_grad(), and leave some requires_grad on",
            )
        for model in self.models:
            model.push_writes()
        session = loss._ref.session
        if session is not self._session:
            self.settle()
        call = loss_call(self, loss)
        session.shadows = None
        if self._session is session:
            self._session = None
        return call

    def backward(self, loss: DeviceTensor) -> None:
        """`loss.backward()`."""
        self.engine.backward(self.lower_loss(loss), scale=1.0)

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


_SECOND = (
    "Trying to backward through the graph a second time: the recorded computation was freed by accelerator.backward."
    " Call the model again, or add the losses and call backward once."
)
