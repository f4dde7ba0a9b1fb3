"""A user's nn.Module on an engine that runs programs: what the engine reads of it, and the module that user code goes on with."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec
from polyaccel.sharding.plan import ModelHints
from polyaccel_torch.dialect.late_values import LateValues
from polyaccel_torch.dialect.sharding_hints import hints_of

from . import scope as capturing
from .exchange import to_numpy
from .guards import ModuleGuard
from .module_state import collect_state
from .output_recorders import install_output_recorders
from .programs import numpy_dtype
from .state_cells import Kind, StateCell
from .tensors import DeviceParameter, DeviceTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tape import Recorder


@final
class _HostArrays(Mapping[str, "NDArray[Any]"]):
    """Tensors as numpy arrays, each when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        return to_numpy(self._tensors[name].detach().cpu())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@final
class ManagedModel:
    """A module whose parameters and buffers an engine owns (the ModelSource of the bridge).

    From `attach` on, every parameter and buffer object of the module, wherever user code holds it, reads and writes the engine's
    arrays.
    """

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        self.module = module
        self.recorder = recorder
        self.handle: Any = None
        self.touched: dict[int, StateCell] = {}  # cells whose host copy may have been written to
        self.names: dict[int, str] = {}  # of managed tensors, by id
        self._slots: dict[str, tuple[dict[str, Any], str]] = {}  # where the tensor of a name sits
        self._cells: dict[tuple[Kind, str], StateCell] = {}
        self._params: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        for place in collect_state({"": module}).places:
            name = place.name.removeprefix(".")
            tensor = place.holder[place.key]
            self.names[id(tensor)] = name
            self._slots.setdefault(name, (place.holder, place.key))
            (self._params if isinstance(tensor, nn.Parameter) else self._buffers)[name] = tensor
        self.transient = _not_saved(module) & {*self._params, *self._buffers}
        self._refuse_unreadable()
        everything = (*self._params.values(), *self._buffers.values())
        self.wants_64bit = any(tensor.dtype in (torch.int64, torch.float64, torch.complex128) for tensor in everything)
        install_output_recorders(module)  # before the guard looks: hooks are part of what it remembers
        self.guard = ModuleGuard(module, self.names)
        self.prepared: PreparedModule | None = None

    def _refuse_unreadable(self) -> None:
        for name, tensor in {**self._params, **self._buffers}.items():
            if isinstance(tensor, DeviceTensor):
                raise PrepareError(
                    f"{name} of {type(self.module).__name__} belongs to a model that was prepared before",
                    "prepare a model once and use what accelerator.prepare returned",
                )

    # -- ModelSource -----------------------------------------------------------------------------------------------------

    def read(self) -> tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]:
        """(params, buffers) by the module's own names; tied ones once, under the first name. What is on the meta device is computed
        when it is asked for, once."""
        return _HostArrays(LateValues(self.module, self._params)), _HostArrays(LateValues(self.module, self._buffers))

    def specs(self) -> tuple[dict[str, ArraySpec], dict[str, ArraySpec]]:
        """Shapes and dtypes of what `read` gives; nothing is computed."""
        params, buffers = (
            {name: ArraySpec(tuple(tensor.shape), numpy_dtype(tensor.dtype).name) for name, tensor in tensors.items()}
            for tensors in (self._params, self._buffers)
        )
        return params, buffers

    def hints(self) -> ModelHints:
        """The plan of a transformers model, and which weights are stored as (in, out)."""
        return hints_of(self.module)

    def attach(self, handle: Any) -> None:
        """The engine owns the values now: the module's tensors become windows on them."""
        self.handle = handle
        self._cut_off_results()
        recurrent = [module for module in self.module.modules() if isinstance(module, nn.RNNBase)]
        for module in recurrent:
            module._flat_weight_refs = []  # weak references keep a tensor from being exchanged
        for name, tensor in self._params.items():
            self._exchange(
                name, tensor, DeviceParameter.make_parameter(self.recorder, tensor, self.cell("params", name))
            )
        for name, tensor in self._buffers.items():
            window = DeviceTensor.make(self.recorder, tensor.shape, tensor.dtype, cell=self.cell("buffers", name))
            self._exchange(name, tensor, window)
        for module in recurrent:
            module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]
        self._params.clear()
        self._buffers.clear()
        self.recorder.adopt(self)

    def settle(self, *, for_writing: bool) -> None:
        """Give the handle what user code wrote on the host, and run what was recorded before the values change."""
        if for_writing:
            self.recorder.settle()
        else:
            self.recorder.settle_effects(self, "buffers")
        self.push_writes()

    def _cut_off_results(self) -> None:
        """Tensors that the model computed from its parameters and keeps (the weight of an old weight_norm) hold these in use.

        A copy that is still refused where a program uses it takes their place, until forward makes them anew.
        """
        for module in self.module.modules():
            for key, value in list(module.__dict__.items()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    module.__dict__[key] = value.detach().clone().requires_grad_()

    def _exchange(self, name: str, tensor: torch.Tensor, window: DeviceTensor) -> None:
        """The user's own tensor object becomes the window: optimizers, lists and closures that hold it see the engine's value."""
        tensor.grad = None
        try:
            torch.utils.swap_tensors(tensor, window)
        except RuntimeError as error:
            raise PrepareError(
                f"{name} of {type(self.module).__name__} is still in use by a computation: {error}",
                "prepare the model before its first forward pass, or delete what holds its outputs",
            ) from error

    # -- values ------------------------------------------------------------------------------------------------------------

    def cell(self, kind: Kind, name: str) -> StateCell:
        """The one cell of an array."""
        found = self._cells.get((kind, name))
        if found is None:
            found = self._cells[kind, name] = StateCell(self, kind, name)
        return found

    def slot(self, name: str) -> torch.Tensor | None:
        """What fills the slot of a parameter or buffer at this moment (during a capture: a fake)."""
        holder, key = self._slots[name]
        now: torch.Tensor | None = holder.get(key)
        return now

    def push_writes(self) -> None:
        """Give everything that user code wrote on the host to the engine; cheap when nothing was."""
        if not self.touched:
            return
        written = [cell for cell in self.touched.values() if cell.is_written()]
        state = [cell for cell in written if cell.kind != "grads"]
        if state:
            self.recorder.settle()  # what was recorded before the write is computed from the values before it
            self.handle.assign({cell.name: to_numpy(cell.host()) for cell in state})
        for cell in written:
            if cell.kind == "grads":
                cell.push()
            else:
                cell.note_clean()
        self.touched = {key: cell for key, cell in self.touched.items() if cell.is_current()}

    def forget_grads(self, names: Sequence[str] | None = None) -> None:
        """Gradients are about to be dropped: tensors of them that user code holds keep their values, as in torch."""
        for (kind, name), cell in list(self._cells.items()):
            if kind == "params" and (names is None or name in names):
                cell.release_grad()
        for cell in list(self.touched.values()):
            if cell.kind == "grads" and (names is None or cell.name in names):
                del self.touched[id(cell)]
                self._cells.pop((cell.kind, cell.name), None)


class PreparedModule(nn.Module):
    """What user code holds for a prepared model: called, read, saved and frozen like the user's module, run by the engine.

    A call under `torch.no_grad()` runs at once; a call that may need gradients is recorded until its values or gradients are
    asked for. Everything else (attributes, `state_dict`, `named_parameters`) is the user's module's, without a prefix.
    """

    def __init__(self, model: ManagedModel) -> None:
        object.__setattr__(self, "_model", model)
        super().__init__()
        self._modules["module"] = model.module

    module: nn.Module
    _model: ManagedModel
    _is_accelerate_prepared = True  # Accelerate's mark of what has been through prepare

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's forward, on the engine's devices."""
        scope = capturing.current()
        if scope is not None:
            return scope.call(self, args, kwargs)
        return self._model.recorder.call_model(self._model, args, kwargs)

    # -- the user's module shows through ---------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        return self._model.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # nn.Module.__init__ sets it; afterwards train() and eval() act on the user's module

    def train(self, mode: bool = True) -> PreparedModule:
        """As in torch."""
        self.module.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model.module, name)

    def __getitem__(self, item: Any) -> Any:
        return self.module[item]  # type: ignore[index]  # a Sequential, a ModuleList ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" or name.startswith("_") or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model.module, name, value)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The user's module's."""
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The user's module's."""
        return self.module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The user's module's."""
        return self.module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The user's module's."""
        return self.module.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The user's module's, with present values."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The user's module's; values are copied to the engine's devices (`assign` makes no difference here)."""
        return self.module.load_state_dict(state_dict, strict=strict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        if set_to_none:
            self._model.forget_grads()
            self._model.handle.zero_grad(None)
        else:
            super().zero_grad(set_to_none=False)

    def _apply(self, fn: Any, recurse: bool = True) -> PreparedModule:
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            example = torch.empty(0, dtype=tensor.dtype)
            made = fn(example)
            if made.dtype != example.dtype or made.device != example.device:
                raise UnsupportedError(
                    f"a prepared {type(self.module).__name__} cannot change from {example.dtype} on {example.device} to"
                    f" {made.dtype} on {made.device}",
                    "convert the model before accelerator.prepare, or use mixed_precision",
                )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.module, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (copy.deepcopy(self.module),)

    def __repr__(self) -> str:
        return f"Prepared({self.module!r})"


def _same(module: nn.Module) -> nn.Module:
    return module


def _not_saved(module: nn.Module) -> frozenset[str]:
    """Names of buffers that are no part of the module's state_dict."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    )
