"""Parameters, buffers and gradients that an engine's handle owns, seen from torch: reads are current, writes reach the handle."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, final

import jax
import torch

from .exchange import fetch_state, to_numpy, torch_dtype
from .packing import Identity
from .tensors import ArrayCell, DeviceParameter, DeviceTensor, HostCell, host_copy

if TYPE_CHECKING:
    from .modules import ManagedModel

Kind = Literal["params", "buffers", "grads"]


@final
class StateCell:
    """One array of a model's handle. Its host tensor is a copy of the present array; a write to it is pushed before the next use."""

    __slots__ = ("__weakref__", "_array", "_grad", "_host", "_model", "_version", "kind", "name")
    is_state = True

    @property
    def is_gradient(self) -> bool:
        """Whether it is a parameter's gradient."""
        return self.kind == "grads"

    def __init__(self, model: ManagedModel, kind: Kind, name: str) -> None:
        self.kind: Kind = kind
        self.name = name
        self._model = model
        self._array: Any = None  # what `_host` is a copy of
        self._host: torch.Tensor | None = None
        self._version = 0
        self._grad: tuple[StateCell, weakref.ref[DeviceTensor]] | None = None

    # -- reading -----------------------------------------------------------------------------------------------------------

    def host(self) -> torch.Tensor:
        """The present value on the CPU; waits for the device."""
        model = self._model
        model.recorder.settle_effects(model, self.kind)
        array = self._current()
        if self._host is None or (self._array is not array and not self.is_written()):
            if array is None:
                raise RuntimeError(f"the gradient of {self.name} was dropped by zero_grad")
            self._host = fetch_state(model.handle.engine, array, self._said)
            self._version = self._host._version
            self._array = array
        model.touched[id(self)] = self
        return self._host

    def to_overwrite(self) -> torch.Tensor:
        """The host tensor for a write of all of it. It counts as the value once it was written to."""
        array = self._current()
        if array is None or array.is_fully_addressable or array.is_fully_replicated or self.is_written():
            return self.host()
        self._model.recorder.settle_effects(self._model, self.kind)
        self._host = torch.empty(array.shape, dtype=torch_dtype(array.dtype.name))
        self._version, self._array = self._host._version, None
        self._model.touched[id(self)] = self
        return self._host

    @property
    def _said(self) -> str:
        name = f"{self.name!r} of {type(self._model.module).__name__}"
        return f"the gradient of {name}" if self.is_gradient else f"the parameter {name}"

    def feed(self) -> tuple[Any, int | None]:
        """A copy for a program that takes the value as an input (gradients and buffers; parameters enter by name)."""
        return host_copy(self.host()), None

    def stamp(self) -> Any:
        """The array itself, and the writes on the host that it does not have yet."""
        model = self._model
        model.recorder.settle_effects(model, self.kind)
        return (
            "state",
            Identity(self._current()),
            self._host._version if self.is_written() and self._host is not None else 0,
        )

    def _current(self) -> Any:
        handle = self._model.handle
        if self.kind == "grads":
            return handle.grads.get(self.name)
        return (handle.params if self.kind == "params" else handle.buffers)[self.name]

    # -- writing -----------------------------------------------------------------------------------------------------------

    def replace(self, value: torch.Tensor, dtype: torch.dtype) -> None:
        """A whole new value; the old one is not fetched."""
        self._model.recorder.settle()
        self._host = value.detach().to(dtype, copy=True).contiguous()
        self._version = -1
        self._array = None
        self._model.touched[id(self)] = self

    def is_written(self) -> bool:
        """Whether the host's copy was written to and not pushed yet."""
        return self._host is not None and self._host._version != self._version

    def is_current(self) -> bool:
        """Whether the host's copy is still the present value, so that a write to it counts."""
        return self._host is not None and self._array is self._current()

    def push(self) -> None:
        """Give what was written on the host to the handle."""
        host = self._host
        assert host is not None
        handle = self._model.handle
        if self.kind == "grads":
            like = handle.params[self.name]
            with jax.enable_x64(True):
                handle.grads = {**handle.grads, self.name: _laid_like(to_numpy(host), like)}
        else:
            handle.assign({self.name: to_numpy(host)})
        self.note_clean()

    def note_clean(self) -> None:
        """The handle now has the host's value."""
        assert self._host is not None
        self._version = self._host._version
        self._array = self._current()

    # -- the gradient of a parameter ---------------------------------------------------------------------------------------

    def grad_tensor(self, parameter: DeviceParameter) -> torch.Tensor | None:
        """The accumulated gradient as a tensor that can be read and written, None where there is none."""
        found = None if self._grad is None else self._grad[1]()
        cell = self._model.cell("grads", self.name)
        array = cell._current()
        if array is None and not (cell.is_written() and cell._array is None):
            self._grad = None
            return None
        if found is None:
            shape, dtype = parameter.shape, parameter.dtype
            found = DeviceTensor.make(parameter._recorder, shape, dtype, cell=cell)
            self._grad = (cell, weakref.ref(found))
        return found

    def release_grad(self) -> None:
        """A gradient tensor that user code holds becomes a value of its own: the next backward makes another one."""
        held, self._grad = self._grad, None
        tensor = None if held is None else held[1]()
        if held is None or tensor is None:
            return
        cell, array = held[0], held[0]._current()
        if cell._host is not None and (array is None or cell.is_written()):
            tensor._cell = HostCell(cell._host)
        elif array is not None:
            tensor._cell = ArrayCell(_StateReader(self._model.handle.engine, held[0]._said), array, None)

    def set_grad(self, parameter: DeviceParameter, value: torch.Tensor | None) -> None:
        """`p.grad = value`."""
        if value is None:
            self._model.forget_grads((self.name,))
            self._model.handle.zero_grad((self.name,))
            return
        if tuple(value.shape) != tuple(parameter.shape):
            raise RuntimeError(
                f"assigned grad of shape {tuple(value.shape)} to {self.name} of shape {tuple(parameter.shape)}"
            )
        host = value.host() if isinstance(value, DeviceTensor) else value
        self._model.cell("grads", self.name).replace(host, parameter.dtype)

    # -- captures ------------------------------------------------------------------------------------------------------------

    def slot_now(self) -> torch.Tensor | None:
        """The tensor that a running capture put into this parameter's or buffer's slot."""
        return self._model.slot(self.name)


@final
class _StateReader:
    """Reads of a gradient that is no longer its parameter's."""

    def __init__(self, engine: Any, what: str) -> None:
        self._engine = engine
        self._what = what

    def to_host(self, array: Any) -> Any:
        """The whole of it."""
        return self._engine.state_to_host(array, self._what)


def _laid_like(host: Any, like: Any) -> Any:
    if like.is_fully_addressable:
        return jax.device_put(host, like.sharding, may_alias=False)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index].copy())


Lookup = Callable[[Kind, str], StateCell]
