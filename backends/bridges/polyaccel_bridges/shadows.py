"""What an operation or a model would give, found on fake tensors: structure, shapes, dtypes and which results need gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from polyaccel.errors import PolyaccelError, PrepareError

from .capture_errors import explained
from .fixed_shapes import FixedShapes
from .module_state import collect_state, filled
from .packing import LEAF, Key, freeze, settle
from .sources import source_of_error
from .tracing import CAPTURE_LOCK, capturing_flags

ValueDependent = (DataDependentOutputException, DynamicOutputShapeException)


class OutSpec(NamedTuple):
    """What is known of a result before it is computed."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


def spec_of(tensor: torch.Tensor) -> OutSpec:
    """The OutSpec of any tensor."""
    return OutSpec(tensor.shape, tensor.dtype, tensor.requires_grad)


@dataclass(frozen=True, slots=True)
class Modes:
    """The thread's modes when user code ran an operation: they are in force again when it is captured."""

    is_grad_enabled: bool
    autocast: torch.dtype | None

    @staticmethod
    def now() -> Modes:
        """The modes of this moment."""
        return (
            _MODES[torch.is_grad_enabled()]
            if not torch.is_autocast_enabled("cpu")
            else Modes(torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"))
        )

    @contextlib.contextmanager
    def active(self, *, allow_grad: bool = True) -> Iterator[None]:
        """Inside, these modes are in force."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.is_grad_enabled and allow_grad))
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            elif torch.is_autocast_enabled("cpu"):
                stack.enter_context(torch.autocast("cpu", enabled=False))
            yield


_MODES = {True: Modes(True, None), False: Modes(False, None)}


class Unavailable:
    """Stands for an output of a model that is neither a tensor nor a plain value; any use of it is refused by name."""

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise self._refusal()

    def _refusal(self) -> PrepareError:
        return PrepareError(
            f"a model's output holds a {object.__getattribute__(self, '_what')}, which cannot leave a compiled program",
            "use it inside a loss function (accelerator.backward(loss_fn, model, batch)), or switch it off (use_cache=False)",
        )

    def __getitem__(self, item: Any) -> Any:
        raise self._refusal()

    def __iter__(self) -> Iterator[Any]:
        raise self._refusal()

    def __len__(self) -> int:
        raise self._refusal()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refusal()

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '_what')} of a compiled program>"


_CARRIED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def freeze_result(value: Any) -> tuple[Key, list[torch.Tensor]]:
    """The structure of what user code returned and its tensors, in order; other objects become Unavailable."""
    tensors: list[torch.Tensor] = []

    def tensor(found: torch.Tensor) -> Key:
        tensors.append(found)
        return (LEAF, len(tensors) - 1)

    def other(found: Any) -> Key:
        if isinstance(found, _CARRIED):
            return freeze(found, tensor)
        return freeze(Unavailable(type(found).__name__), tensor)

    return settle(freeze(value, tensor, other=other)), tensors


def fake_leaf(spec: OutSpec) -> torch.Tensor:
    """A fake tensor that needs a gradient if `spec` does; call it inside the fake mode."""
    fake = torch.empty(spec.shape, dtype=spec.dtype)
    return fake.requires_grad_() if spec.requires_grad else fake


@final
class Fakes:
    """A fake mode of its own, for the operations of one recording."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, torch computes nothing."""
        with self.mode, FixedShapes(), torch.random.fork_rng(devices=[]):
            yield


def infer(
    modules: Mapping[str, nn.Module],
    run: Callable[[Sequence[torch.Tensor]], Any],
    inputs: Sequence[OutSpec],
    modes: Modes,
) -> tuple[Key, list[OutSpec]]:
    """Structure and specs of what `run(fake inputs)`, which calls `modules`, gives. Nothing is computed or changed.

    Raises PrepareError with the user's line where the outputs depend on the values of tensors.
    """
    with CAPTURE_LOCK:
        state = collect_state(modules)
        fakes = Fakes()
        with capturing_flags(), fakes.active():
            held = {name: fake_leaf(_as_out(spec)) for name, spec in state.specs.items()}
            arguments = [_non_leaf(fake_leaf(spec)) for spec in inputs]
            try:
                with filled(state, held), modes.active():
                    result = run(arguments)
            except PolyaccelError:
                raise
            except Exception as error:
                found = explained(error, state.paths)
                if found is error:
                    raise
                raise found from error
            structure, tensors = freeze_result(result)
            return structure, [spec_of(tensor) for tensor in tensors]


def _as_out(spec: Any) -> OutSpec:
    return OutSpec(torch.Size(spec.shape), spec.dtype, spec.requires_grad)


def _non_leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.requires_grad else tensor


def writes(tensors: Mapping[Any, torch.Tensor], act: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What `act()` gives, and the names of the tensors that it wrote to."""
    before = {name: tensor._version for name, tensor in tensors.items()}
    result = act()
    return result, [name for name, tensor in tensors.items() if tensor._version != before[name]]


__all__ = ["Fakes", "Modes", "OutSpec", "Unavailable", "ValueDependent", "source_of_error"]
