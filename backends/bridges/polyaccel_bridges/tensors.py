"""The tensors of a torch script whose values live on the engine's devices, or are still to be computed there.

A `DeviceTensor` is a torch.Tensor. Its metadata is known at once; its value is fetched when somebody looks. Operations on values
that do not exist yet, or that need a gradient, are recorded (tape.py); all others run as plain torch on the fetched value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from polyaccel import trees
from polyaccel.errors import UnsupportedError

from . import scope as capturing
from .exchange import fetch, to_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .recordings import Ref
    from .tape import Recorder

_CPU = torch.device("cpu")


class Cell(Protocol):
    """Where a value is. `host()` is the CPU tensor of it: writing to that tensor writes the value."""

    def host(self) -> torch.Tensor: ...

    def feed(self) -> tuple[Any, int | None]:
        """What a program takes as input, and the dim of it that carries the batch."""
        ...

    def stamp(self) -> Any:
        """Equal as long as the value is the same."""
        ...


STACKED = -1  # the "batch dim" of an array that has one row per process, each process's own value


class ArrayCell:
    """A value on the device; after a write on the host, the host's. With `row`, this process's row of an array of all of them."""

    __slots__ = ("_array", "_axis", "_engine", "_host", "_row", "_version")

    def __init__(self, engine: Any, array: Any, axis: int | None, row: int | None = None) -> None:
        self._engine = engine
        self._array = array
        self._axis = axis
        self._row = row
        self._host: torch.Tensor | None = None
        self._version = 0

    def host(self) -> torch.Tensor:
        """The value on the CPU; waits for the device the first time."""
        if self._host is None:
            whole = fetch(self._engine, self._array)
            self._host = whole if self._row is None else whole[self._row].clone()
            self._version = self._host._version
        return self._host

    def feed(self) -> tuple[Any, int | None]:
        """The device array, or a copy of what the host made of it."""
        if self._row is not None or (self._host is not None and self._host._version != self._version):
            return host_copy(self.host()), self._axis
        return self._array, self._axis

    def stamp(self) -> Any:
        """Writes on the host are counted."""
        return "array", 0 if self._host is None else self._host._version - self._version

    def feed_recording(self) -> tuple[Any, int | None]:
        """The same for a recording, which takes the rows of all processes as they are."""
        if self._row is not None and (self._host is None or self._host._version == self._version):
            return self._array, STACKED
        return self.feed()

    def start_fetch(self) -> Callable[[], NDArray[Any]]:
        """A function that gives the present value as numpy, waiting for the device on whatever thread calls it."""
        if self._host is not None:
            values = host_copy(self._host)
            return lambda: values
        engine, array, row = self._engine, self._array, self._row

        def fetch() -> NDArray[Any]:
            whole: NDArray[Any] = engine.to_host(array)
            return whole if row is None else whole[row]

        return fetch


class HostCell:
    """A value on the host alone."""

    __slots__ = ("_axis", "_tensor")

    def __init__(self, tensor: torch.Tensor, axis: int | None = None) -> None:
        self._tensor = tensor
        self._axis = axis

    def host(self) -> torch.Tensor:
        """The tensor itself."""
        return self._tensor

    def feed(self) -> tuple[Any, int | None]:
        """A copy: the program may run after the tensor was written to."""
        return host_copy(self._tensor), self._axis

    def stamp(self) -> Any:
        """Writes are counted."""
        return "host", self._tensor._version


class ViewCell:
    """A view of a parameter, buffer or gradient: it follows every later value of it, and writes reach it."""

    __slots__ = ("_base", "_view")

    def __init__(self, base: Cell, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._base = base
        self._view = view

    def host(self) -> torch.Tensor:
        """The view of the base's present host tensor."""
        return self._view(self._base.host())

    def feed(self) -> tuple[Any, int | None]:
        """A copy of the present values."""
        return host_copy(self.host()), None

    def stamp(self) -> Any:
        """The base's."""
        return self._base.stamp()


def host_copy(tensor: torch.Tensor) -> NDArray[Any]:
    """The values of a host tensor, safe from later writes."""
    return to_numpy(tensor.detach().clone())


class DeviceTensor(torch.Tensor):
    """A torch.Tensor whose value an engine holds or will compute. Pickled and copied as a plain tensor."""

    _recorder: Recorder
    _shape: torch.Size
    _dtype: torch.dtype
    _requires_grad: bool
    _ref: Ref | None  # its place in a recording that can still be differentiated or computed
    _cell: Any  # a Cell, or None while the value does not exist
    _is_spent: bool  # its graph was freed by a backward

    @staticmethod
    def make(
        recorder: Recorder,
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        requires_grad: bool = False,
        ref: Ref | None = None,
        cell: Any = None,
    ) -> DeviceTensor:
        """A tensor of this shape and dtype with a value (`cell`) or a place in a recording (`ref`)."""
        made = _wrapper(DeviceTensor, shape, dtype, requires_grad)
        return _fill(made, recorder, shape, dtype, requires_grad, ref, cell)

    # -- torch's own hooks -------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached only by code that switches __torch_function__ off: it gets plain values.
        operands = device_tensors((*args, *(kwargs or {}).values()))
        operands[0]._recorder.halves.bypassed(func, operands)
        return func(*_plain(args), **_plain(kwargs or {}))

    # -- metadata, without a detour ------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _CPU

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._shape)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return not self._requires_grad or isinstance(self, DeviceParameter)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return None if self.is_leaf else RECORDED

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad(self) -> torch.Tensor | None:
        return None

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise UnsupportedError(
                f"a value of shape {tuple(self._shape)} that a model computed keeps no .grad",
                "only parameters of prepared models have one",
            )

    def requires_grad_(self, requires_grad: bool = True) -> DeviceTensor:
        """As in torch; a computed value cannot become a leaf that needs a gradient."""
        if requires_grad != self._requires_grad:
            raise UnsupportedError(
                f"requires_grad_({requires_grad}) on a value of shape {tuple(self._shape)} that a model computed",
                "use detach() to stop gradients; for gradients of inputs use accelerator.backward(loss_fn, model, batch)",
            )
        return self

    def retain_grad(self) -> None:
        """Refused: intermediate gradients stay inside the compiled program."""
        raise UnsupportedError(
            "retain_grad() on a value that a prepared model computed",
            "compute the gradient inside a loss function (torch.autograd.grad) with accelerator.backward(loss_fn, ...)",
        )

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        """Refused: gradients exist only inside the compiled program."""
        raise UnsupportedError(
            "register_hook() on a tensor of a prepared model",
            "change p.grad between accelerator.backward and optimizer.step",
        )

    def size(self, dim: int | None = None) -> Any:
        """As in torch."""
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        """As in torch."""
        return len(self._shape)

    ndimension = dim

    def numel(self) -> int:
        """As in torch."""
        return self._shape.numel()

    nelement = numel

    def is_floating_point(self) -> bool:
        """As in torch."""
        return self._dtype.is_floating_point

    def is_complex(self) -> bool:
        """As in torch."""
        return self._dtype.is_complex

    def get_device(self) -> int:
        """As in torch for CPU tensors."""
        return -1

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of a 0-d tensor")
        return self._shape[0]

    def __hash__(self) -> int:
        return id(self)

    # -- reading the value -----------------------------------------------------------------------------------------------

    def host(self) -> torch.Tensor:
        """The value as a plain CPU tensor; computes it first where it does not exist yet, and waits for the device."""
        if self._cell is None:
            self._recorder.compute(self)
        value: torch.Tensor = self._cell.host()
        return value

    def start_fetch(self, *, compute: bool = False) -> Callable[[], NDArray[Any]] | None:
        """A function that gives the present value as numpy; it may wait, on any thread, and later writes do not change what it gives.
        None: the value is still to be computed, which `compute=True` starts without waiting for it."""
        if self._cell is None:
            if not compute:
                return None
            self._recorder.compute(self)
        start = getattr(self._cell, "start_fetch", None)
        if start is not None:
            found: Callable[[], NDArray[Any]] = start()
            return found
        values = host_copy(self.host())
        return lambda: values

    def item(self) -> Any:
        """The Python number of a one-element tensor; waits for the device."""
        if capturing.current() is not None:
            return torch.Tensor.item(self)
        return self.host().item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers; waits for the device."""
        return self.host().tolist()

    def numpy(self, *, force: bool = False) -> NDArray[Any]:
        """The value as numpy; waits for the device. As in torch, a value that needs a gradient has to be detached first."""
        if self._requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.host().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        value = self.numpy()
        return value if dtype is None else value.astype(dtype)

    def __bool__(self) -> bool:
        return bool(self.host())

    def __float__(self) -> float:
        return float(self.host())

    def __int__(self) -> int:
        return int(self.host())

    def __index__(self) -> int:
        return self.host().__index__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(self.host())
        return f"{text[:-1]}, requires_grad=True)" if self._requires_grad and text.endswith(")") else text

    def __format__(self, spec: str) -> str:
        return format(self.host(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copied().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self._copied(), memo)

    def _copied(self) -> torch.Tensor:
        return self.host().detach().clone()

    # -- moving ----------------------------------------------------------------------------------------------------------

    def detach(self) -> torch.Tensor:
        """The same value without its history; nothing is fetched."""
        if capturing.current() is not None or self._cell is None:
            return _recorded(torch.Tensor.detach, self)
        return DeviceTensor.make(self._recorder, self._shape, self._dtype, cell=self._cell)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            getattr(self._cell, "to_overwrite", self.host)().copy_(value)

    def cpu(self, memory_format: Any = torch.preserve_format) -> torch.Tensor:
        """Itself: user code sees every tensor on the CPU device."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in torch; the only device is the one that `accelerator.device` gives, torch's cpu."""
        if capturing.current() is None:
            parse: Any = torch._C._nn._parse_to
            device, dtype, _, _ = parse(
                *[torch.empty(0, dtype=a.dtype) if isinstance(a, DeviceTensor) else a for a in args],
                **{name: value for name, value in kwargs.items() if name != "copy"},
            )
            if device is not None and device.type != "cpu":
                raise UnsupportedError(
                    f"to({device}): the values of a prepared model are moved by polyaccel",
                    "use accelerator.device, which is torch's cpu on this backend",
                )
            if (dtype is None or dtype == self._dtype) and not kwargs.get("copy"):
                return self
            return _recorded(
                torch.Tensor.to, self, dtype or self._dtype, **{k: v for k, v in kwargs.items() if k == "copy"}
            )
        return _recorded(torch.Tensor.to, self, *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refused, with the way out."""
        return self.to("cuda")

    def backward(
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """As `accelerator.backward(loss)` without accumulation's scale; `gradient` is what the value's own gradient is.

        Raises UnsupportedError for `create_graph` and `inputs`.
        """
        if create_graph or inputs is not None:
            raise UnsupportedError(
                f"backward({'create_graph=True' if create_graph else 'inputs=...'}) of a value that a prepared model computed",
                "compute the gradient inside a loss function (torch.autograd.grad): accelerator.backward(loss_fn, model, batch)",
            )
        loss: torch.Tensor = self
        if gradient is not None:
            if tuple(gradient.shape) != tuple(self._shape):
                raise RuntimeError(
                    f"Mismatch in shape: the gradient has a shape of {tuple(gradient.shape)} and the output has a shape of"
                    f" {tuple(self._shape)}."
                )
            with torch.enable_grad():
                loss = (self * gradient).sum()
        assert isinstance(loss, DeviceTensor)
        self._recorder.backward(loss, retain_graph=bool(retain_graph))

    def data_ptr(self) -> int:
        """The address of the fetched value."""
        return self.host().data_ptr()

    def untyped_storage(self) -> Any:
        """The storage of the fetched value."""
        return self.host().untyped_storage()

    def stride(self, dim: int | None = None) -> Any:
        """The strides of a contiguous tensor of this shape."""
        running, reverse = 1, []
        for size in reversed(self._shape):
            reverse.append(running)
            running *= max(size, 1)
        strides = tuple(reversed(reverse))
        return strides if dim is None else strides[dim]

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        """True: what an engine gives is contiguous."""
        return True


class DeviceParameter(DeviceTensor):
    """A parameter of a prepared model: reads give its present value, writes reach it. `isinstance(p, nn.Parameter)` holds."""

    _is_param = True
    _cell: Any
    name: str

    @staticmethod
    def make_parameter(recorder: Recorder, tensor: torch.Tensor, cell: Any) -> DeviceParameter:
        """A stand-in for `tensor`, whose value is now in `cell`."""
        made = _wrapper(DeviceParameter, tensor.shape, tensor.dtype, tensor.requires_grad)
        _fill(made, recorder, tensor.shape, tensor.dtype, tensor.requires_grad, None, cell)
        assert isinstance(made, DeviceParameter)
        return made

    def requires_grad_(self, requires_grad: bool = True) -> DeviceTensor:
        """Freeze or unfreeze; the next forward pass notices."""
        self._requires_grad = requires_grad
        with torch._C.DisableTorchFunctionSubclass():
            _REQUIRE(self, requires_grad)  # C++ decides what PyTorch computes gradients of, see `halves`
        return self

    @property
    def grad(self) -> torch.Tensor | None:
        return self._cell.grad_tensor(self)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        self._cell.set_grad(self, value)

    def slot_now(self) -> torch.Tensor | None:
        """During a capture, the tensor that stands for this parameter."""
        now: torch.Tensor | None = self._cell.slot_now()
        return now

    def _copied(self) -> torch.Tensor:
        return nn.Parameter(super()._copied(), requires_grad=self._requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._copied()
        found: torch.Tensor = memo[id(self)]
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{super().__repr__()}"


class Recorded:
    """What `grad_fn` of a recorded value is."""

    def __repr__(self) -> str:
        return "<RecordedBackward>"

    def name(self) -> str:
        """As torch's nodes have it."""
        return "RecordedBackward"


RECORDED = Recorded()


def _wrapper(kind: type[DeviceTensor], shape: Sequence[int], dtype: torch.dtype, requires_grad: bool) -> DeviceTensor:
    # requires_grad is for torch.autograd.Function alone, which asks C++ and not the property: see `cpp_grad_fn`.
    make: Any = torch.Tensor._make_wrapper_subclass
    made: DeviceTensor = make(kind, shape, dtype=dtype, device=_CPU, requires_grad=requires_grad)
    return made


_GRAD_FN: Any = torch._C.TensorBase.grad_fn
_REQUIRE: Any = torch._C.TensorBase.requires_grad_


def cpp_grad_fn(tensor: torch.Tensor) -> Any:
    """What C++ holds as grad_fn: for a DeviceTensor, the torch.autograd.Function that gave it.

    Its `apply` cannot be intercepted; but it marks its outputs in C++, where nothing else marks a DeviceTensor.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _GRAD_FN.__get__(tensor)


def _fill(
    tensor: DeviceTensor,
    recorder: Recorder,
    shape: torch.Size,
    dtype: torch.dtype,
    requires_grad: bool,
    ref: Ref | None,
    cell: Any,
) -> DeviceTensor:
    tensor.__dict__.update(
        _recorder=recorder,
        _shape=shape,
        _dtype=dtype,
        _requires_grad=requires_grad,
        _ref=ref,
        _cell=cell,
        _is_spent=False,
    )
    return tensor


def _recorded(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    from .dispatch import dispatch

    result: torch.Tensor = dispatch(func, args, kwargs)
    return result


def _plain(tree: Any) -> Any:
    return capturing.map_tensors(lambda t: t.host() if isinstance(t, DeviceTensor) else t, tree)


def device_tensors(values: Iterator[Any] | Sequence[Any]) -> list[DeviceTensor]:
    """Every DeviceTensor in arguments, nested lists, tuples, dicts and slices included."""
    found: list[DeviceTensor] = []
    for value in values:
        if isinstance(value, DeviceTensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found.extend(device_tensors(value))
        elif type(value) is dict:
            found.extend(device_tensors(list(value.values())))
        elif type(value) is slice:
            found.extend(device_tensors((value.start, value.stop, value.step)))
    return found


def tensors_in(values: Iterator[Any] | Sequence[Any]) -> list[torch.Tensor]:
    """Every tensor in the arguments of a model."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif not isinstance(value, str | int | float | None):
            found.extend(leaf for leaf in trees.flatten(value)[0] if isinstance(leaf, torch.Tensor))
    return found
