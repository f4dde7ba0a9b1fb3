"""What a torch operation on DeviceTensors does: it is recorded, or runs as plain torch on the values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from polyaccel.errors import PrepareError, UnsupportedError

from . import scope as capturing
from .scope import is_inplace_name
from .tensors import DeviceParameter, DeviceTensor, ViewCell, cpp_grad_fn, device_tensors

_T = torch.Tensor
_GETTER = "__get__"
# Getters of torch.Tensor that compute something; all others say something about the tensor itself.
_COMPUTING_GETTERS = (_T.T, _T.mT, _T.H, _T.mH, _T.real, _T.imag)
_REBINDING = {
    _T.__iadd__: _T.__add__,
    _T.__isub__: _T.__sub__,
    _T.__imul__: _T.__mul__,
    _T.__itruediv__: _T.__truediv__,
    _T.add_: _T.add,
    _T.sub_: _T.sub,
    _T.mul_: _T.mul,
    _T.div_: _T.div,
}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of `func(*args, **kwargs)` where some operand is a DeviceTensor."""
    scope = capturing.current()
    if scope is not None:
        return func(*_stand_ins(scope, args), **_stand_ins(scope, dict(kwargs)))
    special = _SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    if func is _T.type and len(args) == 1 and not kwargs:
        return torch.empty((), dtype=args[0]._dtype).type()
    if getattr(func, "__name__", "") in (_GETTER, "__set__", "__delete__") and not _computes(func):
        return _metadata(func, args)
    operands = device_tensors((*args, *kwargs.values()))
    is_needed = torch.is_grad_enabled() and any(operand._requires_grad for operand in operands)
    if is_needed or any(operand._cell is None for operand in operands):
        is_inplace, target = _target(func, args, kwargs)
        if is_inplace and not isinstance(target, DeviceTensor):
            return _into_plain(func, args, kwargs, target, operands, is_needed)
        if target is None or not _is_settled(target):
            result = operands[0]._recorder.record(func, args, kwargs)
            if result is not NOT_RECORDED:
                return result
        elif is_needed:
            if getattr(target._cell, "is_gradient", False):  # what it is computed from is a value to it
                with torch.no_grad():
                    return eager(func, args, kwargs, operands)
            if isinstance(target, DeviceParameter) and target._requires_grad:
                raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
            _refuse_inplace(func, target)
    else:
        _, target = _target(func, args, kwargs)
        is_custom = torch.is_grad_enabled() and any(cpp_grad_fn(operand) is not None for operand in operands)
        # What a custom autograd function gave, and writes to values that were read but are still part of the recording.
        if is_custom or (isinstance(target, DeviceTensor) and not _is_settled(target)):
            result = operands[0]._recorder.record(func, args, kwargs)
            if result is not NOT_RECORDED:
                return result
    return eager(func, args, kwargs, operands)


def _is_settled(target: DeviceTensor) -> bool:
    """Whether a write to it is a write to its value, and no operation of the present recording."""
    if isinstance(target, DeviceParameter):
        return True
    if target._ref is not None and not target._recorder.is_recording(target._ref.session):
        target.host()
        return not target._requires_grad
    return target._ref is None and target._cell is not None


class _NotRecorded:
    def __repr__(self) -> str:
        return "NOT_RECORDED"


NOT_RECORDED = _NotRecorded()  # what Recorder.record gives for an operation that plain torch should run


def _stand_ins(scope: capturing.CaptureScope, tree: Any) -> Any:
    return capturing.map_tensors(lambda t: scope.stand_in(t) if isinstance(t, DeviceTensor) else t, tree)


def _computes(func: Any) -> bool:
    owner = getattr(func, "__self__", None)
    return any(owner is getter for getter in _COMPUTING_GETTERS)


def _metadata(func: Any, args: tuple[Any, ...]) -> Any:
    tensor = args[0]
    if func.__name__ != _GETTER:
        raise UnsupportedError(
            f"setting {getattr(func.__self__, '__name__', func)!r} of a value that an engine holds",
            "work on tensor.detach().clone() instead",
        )
    return func(torch.empty((), dtype=tensor._dtype).expand(tensor._shape))


# -- writes --------------------------------------------------------------------------------------------------------------


def _target(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
    if kwargs.get("out") is not None:
        return True, kwargs["out"]
    if (is_inplace_name(getattr(func, "__name__", "")) or kwargs.get("inplace")) and args:
        return True, args[0] if isinstance(args[0], torch.Tensor) else kwargs.get("input")
    return False, None


def _into_plain(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: Any,
    operands: list[DeviceTensor],
    is_needed: bool,
) -> Any:
    """An in-place operation on a plain tensor: `total += loss` gives `total` a new value, everything else needs the numbers now."""
    functional = _REBINDING.get(func)
    if functional is not None and _may_become_recorded(target, args, kwargs):
        result = dispatch(functional, args, kwargs)
        if isinstance(result, DeviceTensor):
            result._recorder.become(target, result)
            return target
        return target.copy_(result)
    if is_needed:
        return operands[0]._recorder.halves.run(
            func, args, kwargs, "it writes into a tensor that is no part of the recording"
        )
    return eager(func, args, kwargs, operands)


def _may_become_recorded(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `target += value` can make the very tensor a recorded one: nobody else sees its memory, and it stays what it is."""
    if type(target) is not torch.Tensor or target.requires_grad or target._is_view() or weakref.getweakrefs(target):
        return False
    storage = target.untyped_storage()  # numpy's and shared memory is not resizable
    if not storage.resizable() or torch._C._storage_Use_Count(storage._cdata) > 2 or kwargs or len(args) != 2:
        return False
    other = args[1]
    if not isinstance(other, torch.Tensor):
        return False
    shape = torch.broadcast_shapes(target.shape, other.shape)
    dtype = torch.result_type(target, torch.empty((), dtype=other.dtype).expand(other.shape))
    return shape == target.shape and dtype == target.dtype


def _refuse_inplace(func: Any, target: Any) -> None:
    shape = tuple(target.shape) if isinstance(target, torch.Tensor) else "?"
    raise PrepareError(
        f"{getattr(func, '__name__', func)} writes a value that needs a gradient into a tensor of shape {shape} that is no"
        " part of the recorded computation",
        "use the operation that returns a new tensor (add instead of add_, torch.cat or torch.where instead of assignment)",
    )


# -- plain torch -----------------------------------------------------------------------------------------------------------


def eager(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], operands: list[DeviceTensor]) -> Any:
    """`func` on the values; what it gives is plain, but for the operands themselves and views of parameters and gradients."""
    hosts = {id(operand): operand.host() for operand in operands}
    for operand in operands:
        if isinstance(operand, DeviceParameter) and operand._requires_grad and torch.is_grad_enabled():
            is_inplace, target = _target(func, args, kwargs)
            if is_inplace and target is operand:
                raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    result = func(*_hosts(args, hosts), **_hosts(dict(kwargs), hosts))
    back = {id(host): operand for operand in operands if (host := hosts[id(operand)]) is not None}
    return _lifted(result, back, func, args, kwargs, operands)


def _hosts(tree: Any, hosts: Mapping[int, torch.Tensor]) -> Any:
    kind = type(tree)
    if isinstance(tree, DeviceTensor):
        return hosts[id(tree)]
    if kind is tuple or kind is list:
        return kind([_hosts(item, hosts) for item in tree])
    if kind is dict:
        return {name: _hosts(item, hosts) for name, item in tree.items()}
    if kind is slice:
        return slice(_hosts(tree.start, hosts), _hosts(tree.stop, hosts), _hosts(tree.step, hosts))
    return tree


def _lifted(
    result: Any,
    back: Mapping[int, DeviceTensor],
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    operands: list[DeviceTensor],
) -> Any:
    if isinstance(result, torch.Tensor):
        own = back.get(id(result))
        if own is not None:
            return own
        if len(operands) == 1 and getattr(operands[0]._cell, "is_state", False) and _shares(result, operands[0].host()):
            base = operands[0]

            def view(host: torch.Tensor) -> torch.Tensor:
                viewed = func(*_hosts(args, {id(base): host}), **_hosts(dict(kwargs), {id(base): host}))
                assert isinstance(viewed, torch.Tensor)
                return viewed

            return DeviceTensor.make(base._recorder, result.shape, result.dtype, cell=ViewCell(base._cell, view))
        return result
    if type(result) in (list, tuple):
        return type(result)([_lifted(item, back, None, (), {}, []) for item in result])
    return result


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.numel() > 0


# -- functions with an answer of their own ---------------------------------------------------------------------------------


def _grad_of(*args: Any, **kwargs: Any) -> Any:
    from .input_gradients import grad

    return grad(*args, **kwargs)


def _backward_of(
    tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False, **options: Any
) -> None:
    weighted_sum(tensors, grad_tensors).backward(None, retain_graph, create_graph, **options)


def weighted_sum(tensors: Any, grad_tensors: Any) -> torch.Tensor:
    """The scalar whose gradient is that of `tensors` times `grad_tensors` (None, or for each of them a tensor or None)."""
    losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    seeds = [None] * len(losses) if grad_tensors is None else grad_tensors
    seeds = [seeds] if isinstance(seeds, torch.Tensor) else list(seeds)
    with torch.enable_grad():
        for loss, seed in zip(losses, seeds, strict=True):
            if seed is not None and tuple(seed.shape) != tuple(loss.shape):
                raise RuntimeError(
                    f"Mismatch in shape: the gradient has a shape of {tuple(seed.shape)} and the output has a shape of"
                    f" {tuple(loss.shape)}."
                )
        terms = [loss if seed is None else (loss * seed).sum() for loss, seed in zip(losses, seeds, strict=True)]
        if any(term.numel() != 1 for term in terms):
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        total: torch.Tensor = terms[0]
        for term in terms[1:]:
            total = total.reshape(()) + term.reshape(())
    return total


def _of_value(func: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        return eager(func, args, kwargs, device_tensors((*args, *kwargs.values())))

    return read


def _copy_into(target: torch.Tensor, source: Any, *rest: Any, **kwargs: Any) -> torch.Tensor:
    """`copy_`: a whole new value; what was there need not be fetched."""
    value = source.host() if isinstance(source, DeviceTensor) else source
    if not isinstance(target, DeviceTensor):
        if isinstance(source, DeviceTensor) and source._requires_grad and torch.is_grad_enabled():
            _refuse_inplace(_T.copy_, target)
        return target.copy_(value, *rest, **kwargs)
    if target._cell is None:
        recorded: torch.Tensor = target._recorder.record(_T.copy_, (target, source, *rest), kwargs)
        return recorded
    if torch.is_grad_enabled() and target._requires_grad:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    getattr(target._cell, "to_overwrite", target.host)().copy_(value, *rest, **kwargs)
    return target


def _require(tensor: DeviceTensor, requires_grad: bool = True) -> DeviceTensor:
    return tensor.requires_grad_(requires_grad)


def _new_like(func: Callable[..., Any]) -> Callable[..., Any]:
    """new_zeros, zeros_like ...: only shape and dtype count, so nothing is fetched."""

    def make(tensor: DeviceTensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, DeviceTensor):
            return eager(func, (tensor, *args), kwargs, device_tensors((*args, *kwargs.values())))
        return func(torch.empty((), dtype=tensor._dtype).expand(tensor._shape), *args, **kwargs)

    return make


def _each(*names: str) -> Iterator[Any]:
    for name in names:
        for owner in (_T, torch):
            if hasattr(owner, name):
                yield getattr(owner, name)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: _grad_of,
    torch.autograd.backward: _backward_of,
    _T.copy_: _copy_into,
    _T.requires_grad_: _require,
    torch.equal: _of_value(torch.equal),
    _T.equal: _of_value(_T.equal),
    torch.allclose: _of_value(torch.allclose),
    _T.allclose: _of_value(_T.allclose),
    torch.is_nonzero: _of_value(torch.is_nonzero),
    _T.__contains__: _of_value(_T.__contains__),
    **{func: _of_value(func) for func in _each("__dlpack__", "storage", "share_memory_", "pin_memory")},
    **{
        func: _new_like(func)
        for func in _each(
            "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros_like", "ones_like", "empty_like", "full_like",
            "rand_like", "randn_like", "randint_like",
        )
    },
}  # fmt: skip
