"""Keeps an optimizer's numbers out of the compiled graph: a new learning rate is new data, never a new program.

PyTorch/XLA passes most Python floats to a graph as data, but turns 0 and 1 into constants and feeds equal floats from one input.
A schedule that starts at 0, or whose rate happens to equal another number, would change the graph and compile it again. Here
every float of an update is an input of its own group, and groups only ever split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Upload = Callable[[torch.Tensor], torch.Tensor]  # host tensor in, the same values as device data out
UploadLike = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # the same, to where a second tensor's values are


class _Slot:
    """One graph input: a 0-d device tensor that is replaced when its value changes."""

    __slots__ = ("dtype", "step", "tensor", "value")

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        self.value = value
        self.dtype = dtype
        self.step = -1
        self.tensor: torch.Tensor | None = None


class DeviceHyperparameters(TorchFunctionMode):
    """Active around `optimizer.step()` of one optimizer: floats that meet device tensors become 0-d device tensors.

    The n-th float of a step belongs to a slot. Floats that were equal in every step so far share one; when they differ for the
    first time the slot splits, and never joins again, so the graph stays the same however the values move. The results are the
    optimizer's own within rounding. Zeros that a first step creates as
    optimizer state are uploaded too, so that the first step is the same graph as all later ones.
    """

    def __init__(self, upload_scalar: Upload, upload: UploadLike) -> None:
        super().__init__()
        self._upload_scalar = upload_scalar
        self._upload = upload
        self._slots: list[_Slot] = []  # by position in the step
        self._position = 0
        self._step = 0
        self._shared: dict[tuple[float, torch.dtype], _Slot] = {}  # slots of floats never seen before, of this step
        self._split: dict[tuple[int, float], _Slot] = {}  # slots split off in this step
        self._is_first = True
        self._is_outside = False

    def __enter__(self) -> DeviceHyperparameters:
        self._position = 0
        self._step += 1
        self._shared.clear()
        self._split.clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._is_first = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rewrite = None if self._is_outside or "out" in kwargs else _REWRITES.get(func)
        if rewrite is not None and _is_on_device(args):
            return rewrite(self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that recomputes the loss inside a step: its own floats are left alone."""

        def untouched() -> Any:
            self._is_outside = True
            try:
                return closure()
            finally:
                self._is_outside = False

        return untouched

    def tensor(self, value: float, like: torch.Tensor) -> torch.Tensor:
        """The device tensor of the next float of this step."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        position = self._position
        self._position += 1
        if position == len(self._slots):
            slot = self._shared.get((value, dtype))
            if slot is None:
                slot = self._shared[value, dtype] = _Slot(value, dtype)
            self._slots.append(slot)
        slot = self._slots[position]
        is_taken = slot.step == self._step and slot.value != value
        if is_taken or slot.dtype != dtype:
            key = (id(slot), value)
            if key not in self._split:
                self._split[key] = _Slot(value, dtype)
            slot = self._slots[position] = self._split[key]
        if slot.tensor is None or slot.value != value:
            slot.value = value
            slot.tensor = self._upload_scalar(torch.tensor(value, dtype=slot.dtype))
        slot.step = self._step
        return slot.tensor

    def _convert(self, value: Any, like: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        """A float, or a list of floats for a list of tensors, as device tensors; anything else as it is."""
        first = like if isinstance(like, torch.Tensor) else like[0]
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.dim():
            value = value.item()  # a learning rate given as a host tensor
        if isinstance(value, float):
            return self.tensor(value, first)
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, float) for item in value):
            if len(set(value)) == 1:  # the usual case: all parameters have made the same number of steps
                return [self.tensor(value[0], first)] * len(value)
            return [self.tensor(item, first) for item in value]
        return value

    # -- one rewrite per kind of operation -----------------------------------------------------------------------------

    def _scalar_operand(self, func: Any, this: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
        other = self._convert(other, this)
        if isinstance(kwargs.get("alpha"), float):
            other = _times(other, self.tensor(kwargs.pop("alpha"), this if isinstance(this, torch.Tensor) else this[0]))
        return func(this, other, *rest, **kwargs)

    # torch finds the shapes of addcmul, addcdiv and lerp on XLA tensors in Python, ten times slower than those of the plain
    # operations that they are made of; once compiled they are the same.

    def _addcmul(self, func: Any, this: Any, left: Any, right: Any, value: Any = 1) -> Any:
        return self._add_product(func, this, left, right, value, torch.mul, torch._foreach_mul)

    def _addcdiv(self, func: Any, this: Any, left: Any, right: Any, value: Any = 1) -> Any:
        return self._add_product(func, this, left, right, value, torch.div, torch._foreach_div)

    def _add_product(self, func: Any, this: Any, left: Any, right: Any, value: Any, one: Any, many: Any) -> Any:
        if not (isinstance(value, int) and value == 1):
            left = _times(left, self._convert(value, this))
        product = one(left, right) if isinstance(this, torch.Tensor) else many(left, right)
        return _add(func, this, product)

    def _lerp(self, func: Any, this: Any, end: Any, weight: Any) -> Any:
        distance = end - this if isinstance(this, torch.Tensor) else torch._foreach_sub(end, this)
        return _add(func, this, _times(distance, self._convert(weight, this)))

    def _created(self, func: Any, this: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._is_first or not kwargs.keys() <= {"dtype", "memory_format", "fill_value"}:
            return func(this, *args, **kwargs)
        dtype = kwargs.pop("dtype", None) or this.dtype
        kwargs.pop("memory_format", None)
        if func is torch.Tensor.new_zeros:
            return self._upload(torch.zeros(*args, dtype=dtype), this)
        return self._upload(func(torch.empty(this.shape, dtype=dtype), *args, **kwargs), this)


def _is_on_device(args: Sequence[Any]) -> bool:
    first = args[0] if args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, torch.Tensor) and first.device.type == "xla"


def _add(like: Any, this: Any, change: Any) -> Any:
    """this + change, in place if `like` is an in-place function."""
    in_place = like.__name__.endswith("_")
    if isinstance(this, torch.Tensor):
        return this.add_(change) if in_place else this + change
    return torch._foreach_add_(this, change) if in_place else torch._foreach_add(this, change)


def _times(tensors: Any, factor: Any) -> Any:
    return tensors * factor if isinstance(tensors, torch.Tensor) else torch._foreach_mul(tensors, factor)


_HERE = DeviceHyperparameters
_BINARY = ("add", "sub", "mul", "div")
_REWRITES: dict[Any, Callable[..., Any]] = {
    **{getattr(torch, name): _HERE._scalar_operand for name in _BINARY},
    **{getattr(torch.Tensor, name + suffix): _HERE._scalar_operand for name in _BINARY for suffix in ("", "_")},
    **{getattr(torch, f"_foreach_{name}{suffix}"): _HERE._scalar_operand for name in _BINARY for suffix in ("", "_")},
    **{
        getattr(owner, prefix + name + suffix): rewrite
        for name, rewrite in (("addcmul", _HERE._addcmul), ("addcdiv", _HERE._addcdiv), ("lerp", _HERE._lerp))
        for owner, prefix, suffix in (
            (torch, "", ""),
            (torch.Tensor, "", ""),
            (torch.Tensor, "", "_"),
            (torch, "_foreach_", ""),
            (torch, "_foreach_", "_"),
        )
    },
    **dict.fromkeys((torch.zeros_like, torch.ones_like, torch.full_like, torch.Tensor.new_zeros), _HERE._created),
}
