"""What is active while PyTorch captures user code: prepared models run for real, and tensors from outside are found and named."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from polyaccel.errors import PrepareError

from .attributes import Change, Constants, Watch
from .recomputed_blocks import recomputed_blocks
from .rehearsals import Trace

if TYPE_CHECKING:
    from .modules import PreparedModule

_active = threading.local()
_BAKED_LIMIT = 65536  # elements; a larger tensor from outside becomes an input instead of a constant of the program


def current() -> CaptureScope | None:
    """The scope of the capture that runs in this thread, if one does."""
    return getattr(_active, "scope", None)


@final
class CaptureScope:
    """One capture: which prepared models may run, in which autocast dtype, and which outside tensors stand for which inputs.

    `given` maps outside tensors to the leaf that stands for each. Outside tensors that are not in it are noted in `found`, in
    order, and their values become constants of the program.
    """

    def __init__(
        self,
        models: Sequence[PreparedModule],
        autocast: torch.dtype | None,
        given: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        self.models = tuple(models)
        self.autocast = autocast
        self.found: list[torch.Tensor] = []
        self.watches: list[Watch] = []  # of the models that ran
        self.changes: list[Change] = []  # of their attributes, when it is over
        self.operations: list[Any] = []  # every torch function that ran, in order
        self.trace = Trace()  # the same with what they were given
        self.constants = Constants()
        self.writes_params = False  # a forward writes to parameters in place; seen on fake tensors alone
        self._param_storages: set[int] = set()
        self._given = {id(outside): (outside, leaf) for outside, leaf in given}
        self._found_ids: set[int] = set()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this is the thread's scope."""
        before = current()
        _active.scope = self
        try:
            with _Outside(self):
                yield
            self.changes = [change for watch in self.watches for change in watch.changes()]
        finally:
            _active.scope = before

    def call(self, prepared: PreparedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the user's module as its prepared one runs it: under autocast, its floating outputs in float32."""
        if prepared not in self.models:
            raise PrepareError(
                f"the captured function calls {type(prepared.module).__name__}, a prepared model that it was not given",
                "pass every model as an argument: accelerator.backward(loss_fn, model, other_model, batch)",
            )
        guard = prepared._model.guard
        if all(watch.guard is not guard for watch in self.watches):
            self.watches.append(Watch(guard))
            self.trace.name_state(prepared.module)
            fakes = [parameter for parameter in prepared.module.parameters() if isinstance(parameter, FakeTensor)]
            self._param_storages |= {_storage(fake) for fake in fakes}
        self.trace.note(run_model, (args, kwargs))
        with recomputed_blocks(prepared.module, prepared._model.recorder.engine.plan.remat):
            outputs = run_model(prepared.module, args, kwargs, self.autocast)
        self.trace.note_outputs(outputs)
        return outputs

    def note_write(self, target: Any) -> None:
        """An operation wrote to `target`; `.data` and views of a parameter have its storage."""
        if isinstance(target, FakeTensor) and _storage(target) in self._param_storages:
            self.writes_params = True

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """What takes the place of a tensor from outside. Raises PrepareError where its gradient would be lost."""
        managed = _managed(tensor)
        if managed is not None:
            return managed
        if tensor.requires_grad and torch.is_grad_enabled():
            refuse_foreign(tensor)
        given = self._given.get(id(tensor))
        if given is not None:
            return given[1]
        if id(tensor) not in self._found_ids:
            self._found_ids.add(id(tensor))
            self.found.append(tensor)
        return tensor if type(tensor) is torch.Tensor else torch.Tensor.detach(_plain(tensor))


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():  # to look is no operation of the user's
        number: int = tensor.untyped_storage()._cdata
    return number


def is_inplace_name(name: str) -> bool:
    """True for add_, copy_, __iadd__, __setitem__ and their kin."""
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
        )
    return name.endswith("_") and not name.endswith("__")


def _managed(tensor: torch.Tensor) -> torch.Tensor | None:
    """The slot's present tensor of a managed parameter or buffer that code holds outside its module's slots."""
    slot = getattr(tensor, "slot_now", None)
    return None if slot is None else slot()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    host = getattr(tensor, "host", None)
    return tensor if host is None else host()


def is_large(tensor: torch.Tensor) -> bool:
    """Too large to be a constant of a program."""
    return tensor.numel() > _BAKED_LIMIT


# What is asked of a tensor without using its values; attributes (`tensor.shape`) arrive as __get__.
_ASKING = frozenset(
    {"__get__", "size", "dim", "numel", "is_floating_point", "is_complex", "stride", "is_contiguous", "__len__"}
)


class _Outside(TorchFunctionMode):
    """Looks at the operands of every torch call: neither fake nor functional means from outside the capture."""

    def __init__(self, scope: CaptureScope) -> None:
        super().__init__()
        self._scope = scope

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ASKING:
            return func(*args, **kwargs)
        self._scope.operations.append(func)
        given = (args, kwargs)
        self._scope.trace.note(func, given)
        if args and is_inplace_name(getattr(func, "__name__", "")):
            self._scope.note_write(args[0])
        if any(_is_outside(value) for value in (*args, *kwargs.values())):
            args, kwargs = self._replaced(args), self._replaced(kwargs)
        else:
            for value in (*args, *kwargs.values()):
                if type(value) in (list, tuple, dict):
                    args, kwargs = self._replaced(args), self._replaced(kwargs)
                    break
        result = func(*args, **kwargs)
        self._scope.constants.note(func, given, result)
        self._scope.trace.note(None, result)
        return result

    def _replaced(self, tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self._one, tree)

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._scope.stand_in(tensor) if _is_outside(tensor) else tensor


def _is_outside(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    wrapped: Any = torch._C._functorch
    while wrapped.is_functorch_wrapped_tensor(value):  # inside torch.func.grad, vmap and their kin
        value = wrapped.get_unwrapped(value)
    return not isinstance(value, FunctionalTensor | FakeTensor)


def run_model(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], autocast: torch.dtype | None) -> Any:
    """The module's outputs; under autocast floating ones come out in float32, as Accelerate gives them."""
    if autocast is None:
        return module(*args, **kwargs)
    with torch.autocast("cpu", dtype=autocast):
        outputs = module(*args, **kwargs)
    return map_tensors(_widened, outputs)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The nested value with `function` applied to every tensor."""
    from polyaccel import trees

    return trees.map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def refuse_foreign(tensor: torch.Tensor) -> None:
    """Raise PrepareError for a tensor that needs a gradient which nobody would give it, by the name it has in user code."""
    what = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    name = name_in_user_code(tensor)
    raise PrepareError(
        f"the {what} {name + ' ' if name else ''}of shape {tuple(tensor.shape)} requires grad, but belongs to no prepared model:"
        " its gradient would be lost",
        "make it an nn.Parameter of a module that accelerator.prepare gets, or detach() it",
    )


def name_in_user_code(tensor: torch.Tensor) -> str | None:
    """The name of a variable, or of a module's parameter in a variable, that holds this very tensor in a calling frame."""
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in (
            "torch",
            "polyaccel",
            "polyaccel_bridges",
        ):
            for name, value in (*frame.f_locals.items(), *frame.f_globals.items()):
                if value is tensor:
                    return repr(name)
                if isinstance(value, nn.Module):
                    for path, parameter in value.named_parameters():
                        if parameter is tensor:
                            return repr(f"{name}.{path}")
        frame = frame.f_back  # type: ignore[assignment]
    return None
