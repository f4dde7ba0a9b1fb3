"""What a recording cannot follow: PyTorch computes on from the values, and its gradients go back into the compiled programs.

The model's forward is one compiled half. Its outputs are handed to PyTorch, whose own autograd drives the user's part; the gradients
that reach the outputs enter the other half, the compiled backward. Slower than one program, equally exact, and said once.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from polyaccel.errors import PrepareError, UnsupportedError

from . import scope as capturing
from .tensors import DeviceTensor, cpp_grad_fn, device_tensors

if TYPE_CHECKING:
    from .calls import TorchCall
    from .tape import Recorder

_log = logging.getLogger(__name__)
_C: Any = torch._C
_OWN = frozenset({"torch", "polyaccel", "polyaccel_bridges"})
_BYPASSED = "compiled code runs it that cannot be looked into"


class Unfollowed(Exception):
    """An operation that a recording cannot hold; `reason` completes "because ..." (None: it only goes on from such a one)."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason


@final
class Halves:
    """The hand-over of one recorder's values to PyTorch and of their gradients back."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._collected: list[tuple[DeviceTensor, torch.Tensor]] = []
        self._is_lowering = False
        self._said: set[tuple[str, int]] = set()

    # -- forward -----------------------------------------------------------------------------------------------------------

    def run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str | None
    ) -> Any:
        """`func` by PyTorch on the values, with gradients where they are wanted; the result is a plain tensor.

        Raises UnsupportedError in a job of several processes, whose values are parts of one program.
        """
        operands = device_tensors((*args, *kwargs.values()))
        if torch.is_grad_enabled() and any(self._needs_grad(operand) for operand in operands):
            name = getattr(func, "__name__", str(func))
            if self._recorder.num_processes > 1:
                raise UnsupportedError(
                    f"{name} on a prepared model's output, with gradients: {reason or 'it goes on from plain torch'}, and in a job of"
                    " several processes only recorded operations have them",
                    "compute it inside the model or a loss function, use torch.where instead of masks, or detach() what needs no gradient",
                )
            self._say(name, reason)
        plain = {id(operand): self._handed(operand) for operand in operands}
        return func(*_exchanged(args, plain), **_exchanged(dict(kwargs), plain))

    def computed(self, tensor: torch.Tensor) -> bool:
        """Whether PyTorch computed a plain tensor from handed values. Raises PrepareError if foreign tensors take part too."""
        leaves = list(leaves_of_graph(tensor))
        ours = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        if ours:
            for leaf in leaves:
                if not isinstance(leaf, DeviceTensor):
                    capturing.refuse_foreign(leaf)
        return bool(ours)

    def watch(self, tensor: DeviceTensor) -> None:
        """Let gradients that PyTorch computes for a tensor come back here."""
        if tensor.__dict__.get("_is_watched"):
            return
        with _C.DisableTorchFunctionSubclass():
            if not _C.TensorBase.requires_grad.__get__(tensor):
                _C.TensorBase.requires_grad_(tensor, True)
            # What register_post_accumulate_grad_hook does, which asks the tensor's Python properties whether it is a leaf.
            _C.TensorBase._post_accumulate_grad_hooks.__set__(tensor, OrderedDict({0: self._collect}))
        tensor.__dict__["_is_watched"] = True

    def bypassed(self, func: Any, operands: Sequence[DeviceTensor]) -> None:
        """Code that asks no __torch_function__ (torch.jit, vmap) reads values: if it needs gradients, they come back."""
        wanting = [operand for operand in operands if self._needs_grad(operand)]
        if not wanting or not torch.is_grad_enabled() or self._is_lowering:
            return
        if self._recorder.num_processes > 1:
            raise UnsupportedError(
                f"{func} on a prepared model's output is called by {_BYPASSED}: in a job of several processes it has no gradient",
                "call it inside the model or inside a loss function: accelerator.backward(loss_fn, model, batch)",
            )
        self._say(str(func), _BYPASSED)
        for operand in wanting:
            self._watch_sources(operand)

    def _needs_grad(self, tensor: DeviceTensor) -> bool:
        return tensor._requires_grad or cpp_grad_fn(tensor) is not None

    def _handed(self, tensor: DeviceTensor) -> torch.Tensor:
        """A plain copy of the value, whose gradient comes back."""
        if not torch.is_grad_enabled() or not self._needs_grad(tensor):
            return tensor.host()
        if tensor._is_spent:
            from .tape import SECOND

            raise RuntimeError(SECOND)
        value = tensor.host().detach()
        self._watch_sources(tensor)
        with _C.DisableTorchFunctionSubclass():
            self._is_lowering, before = True, self._is_lowering
            try:
                copied: torch.Tensor = torch.Tensor.clone(tensor)
            finally:
                self._is_lowering = before
        assert copied.shape == value.shape
        return copied

    def _watch_sources(self, tensor: DeviceTensor) -> None:
        if cpp_grad_fn(tensor) is None:
            self.watch(tensor)
            return
        for leaf in leaves_of_graph(tensor):  # what a custom autograd function took
            if isinstance(leaf, DeviceTensor):
                self.watch(leaf)
            else:
                capturing.refuse_foreign(leaf)

    # -- backward ----------------------------------------------------------------------------------------------------------

    def lower(self, loss: torch.Tensor, retain_graph: bool, scale: float) -> TorchCall:
        """A loss that PyTorch computed from handed values as a program call; PyTorch's half of the backward runs here."""
        if isinstance(loss, DeviceTensor):
            loss = self._handed(loss)
        if loss.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        self.computed(loss)
        self._collected.clear()
        self._is_lowering = True
        try:
            torch.autograd.backward(loss, retain_graph=retain_graph)
            return self._lowered(retain_graph, scale)
        finally:
            self._is_lowering = False
            self._collected.clear()

    def _lowered(self, retain_graph: bool, scale: float = 1.0) -> TorchCall:
        """The recorded sum of value * gradient over the handed values: it has the gradients of the loss."""
        if not self._collected:
            raise PrepareError(
                "the loss depends on no trainable parameter of the prepared models",
                "compute it outside torch.no_grad(), and leave some requires_grad on",
            )
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            terms = [_product(tensor, grad) for tensor, grad in self._collected]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
        return self._recorder.lower_loss(total, retain_graph=retain_graph, scale=scale)

    def _collect(self, tensor: torch.Tensor) -> None:
        """Called by autograd with the whole gradient of a handed value."""
        assert isinstance(tensor, DeviceTensor)
        with _C.DisableTorchFunctionSubclass():
            grad: torch.Tensor = _C.TensorBase.grad.__get__(tensor)
            _C.TensorBase.grad.__set__(tensor, None)
        if not tensor._requires_grad:
            return
        plain = grad.host() if isinstance(grad, DeviceTensor) else grad
        if not self._is_lowering and not self._collected:  # loss.backward() of PyTorch's own
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._collected.append((tensor, plain.detach()))

    def _finish(self) -> None:
        self._is_lowering = True
        try:
            call = self._lowered(retain_graph=False)
        finally:
            self._is_lowering = False
            self._collected.clear()
        self._recorder.engine.backward(call, scale=1.0)

    # -- once said -----------------------------------------------------------------------------------------------------------

    def _say(self, name: str, reason: str | None) -> None:
        place = user_line()
        if reason is None or place in self._said:
            return
        self._said.add(place)
        _log.warning(
            "%s:%d: %s is computed by PyTorch on the host, because %s; so is what follows from it, with gradients. The model's"
            " forward and backward stay compiled, as two programs: the step is exact, and slower.",
            *place,
            name,
            reason,
        )


def _product(tensor: DeviceTensor, grad: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return (tensor * grad.conj().resolve_conj()).real.sum()
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return (wide * grad.to(wide.dtype)).sum()


def leaves_of_graph(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The leaves of a tensor's autograd graph, as C++ has it."""
    first = cpp_grad_fn(tensor)
    if first is None:
        yield tensor
        return
    seen = {first}
    waiting = [first]
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _exchanged(tree: Any, plain: Mapping[int, torch.Tensor]) -> Any:
    kind = type(tree)
    if isinstance(tree, DeviceTensor):
        return plain[id(tree)]
    if kind is tuple or kind is list:
        return kind([_exchanged(item, plain) for item in tree])
    if kind is dict:
        return {name: _exchanged(item, plain) for name, item in tree.items()}
    if kind is slice:
        return slice(*[_exchanged(item, plain) for item in (tree.start, tree.stop, tree.step)])
    return tree


def user_line() -> tuple[str, int]:
    """File and line of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _OWN:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "<unknown>", 0
