"""Records the ATen calls that PyTorch's own operation samples make, and holds each lowering against what torch returned.

The samples are PyTorch's OpInfo database, forward and backward. A dispatch mode applies the decompositions that the capture applies,
so a recorded call is one that a captured graph can contain; lowerings of operations that these decompositions replace are recorded
in a second pass without them. A call is kept with the real inputs that torch had.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import numpy as np
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from polyaccel_bridges.decompositions import capture_decompositions
from polyaccel_bridges.lowerings import LOWERINGS
from polyaccel_bridges.lowerings.promotion import NUMPY_OF_TORCH, numpy_dtype

STORAGE_ARGUMENTS = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen call as torch made it; the tensors are copies, so a later in-place write cannot change them."""

    sample: str  # the OpInfo operation that led here
    overload: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def __str__(self) -> str:
        shown = [_describe(leaf) for leaf in (*self.args, *(f"{k}={_describe(v)}" for k, v in self.kwargs.items()))]
        return f"{self.overload}({', '.join(shown)}) from {self.sample}"


def call(overload: OpOverload, *args: Any, **kwargs: Any) -> Call:
    """A call written by hand."""
    return Call("a call written by hand", overload, _copied(args), _copied(kwargs), overload(*args, **kwargs))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return f"[{', '.join(map(_describe, value))}]"
    return str(value)


def _has_arrays(leaf: Any) -> bool:
    """jax has no complex32, quantized or sparse arrays."""
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        return False
    dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
    return not isinstance(dtype, torch.dtype) or dtype in NUMPY_OF_TORCH


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


@dataclass
class Selection:
    """Keeps a few different calls of every wanted overload and combination of dtypes: `per_kind` in float32, one in others."""

    overloads: frozenset[OpOverload]
    per_kind: int
    calls: list[Call] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)
    _kinds: Counter[Any] = field(default_factory=Counter)

    def wants(self, overload: OpOverload, args: Any, kwargs: Any) -> bool:
        if overload not in self.overloads:
            return False
        refuses = LOWERINGS[overload].refuses
        if refuses is not None and refuses(*args, **kwargs):
            return False
        leaves = tree_flatten((args, kwargs))[0]
        if not all(map(_has_arrays, leaves)):
            return False
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (overload, *(leaf.dtype for leaf in tensors))
        limit = self.per_kind if any(leaf.dtype is torch.float32 for leaf in tensors) else 1
        signature = (overload, *map(_describe, leaves))
        if signature in self._seen or self._kinds[kind] >= limit:
            return False
        self._seen.add(signature)
        self._kinds[kind] += 1
        return True


class Recorder(TorchDispatchMode):
    """Decomposes as the capture does, runs what is left and hands the calls to the selection."""

    def __init__(self, selection: Selection, decompositions: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.selection = selection
        self.decompositions = decompositions
        self.sample = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.decompositions:
            with self:
                result = self.decompositions[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        keeps = self.selection.wants(func, args, kwargs)
        before = _copied((args, kwargs)) if keeps else None
        result = func(*args, **kwargs)
        if before is not None:
            self.selection.calls.append(Call(self.sample, func, tuple(before[0]), before[1], _copied(result)))
        return result


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def record(overloads: Iterable[OpOverload], *, per_kind: int = 2, samples: int = 6) -> list[Call]:
    """The calls that OpInfo's samples make of `overloads`, those that the capture would decompose included."""
    decompositions = capture_decompositions()
    wanted = frozenset(overloads)
    calls = _record(wanted, decompositions, per_kind, samples)
    replaced = (wanted & decompositions.keys()) - {call.overload for call in calls}
    return calls + _record(replaced, {}, per_kind, samples)


def _record(
    overloads: frozenset[OpOverload], decompositions: dict[Any, Callable[..., Any]], per_kind: int, samples: int
) -> list[Call]:
    from torch.testing._internal.common_methods_invocations import op_db

    selection = Selection(overloads, per_kind)
    recorder = Recorder(selection, decompositions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samples of deprecated and experimental operations announce themselves
        for operation in op_db:
            recorder.sample = operation.name
            for dtype in DTYPES:
                if operation.supports_dtype(dtype, "cpu"):
                    _run_samples(operation, dtype, recorder, samples)
    return selection.calls


def _run_samples(operation: Any, dtype: torch.dtype, recorder: Recorder, samples: int) -> None:
    torch.default_generator.manual_seed(0)
    random.seed(0)
    differentiable = operation.supports_autograd and dtype in operation.supported_backward_dtypes("cpu")
    try:
        # the generator itself: the public method seeds every device again for each sample, which takes longer than the rest
        generated = iter(operation.sample_inputs_func(operation, "cpu", dtype, differentiable))
        for sample in spread(generated, samples):
            with recorder:
                outputs = operation(sample.input, *sample.args, **sample.kwargs)
                _differentiate(outputs, (sample.input, sample.args, sample.kwargs))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError):
        return  # some samples need CUDA, sparse tensors or a shape check that the decomposition refuses


def spread(samples: Iterator[Any], count: int) -> Iterator[Any]:
    """The first half of `count`, then as many of the 40 behind them, where the unusual shapes stand."""
    yield from islice(samples, count - count // 2)
    rest = list(islice(samples, 40))
    step = max(1, len(rest) // max(1, count // 2))
    yield from rest[step - 1 :: step]


def _differentiate(outputs: Any, inputs: Any) -> None:
    def differentiable(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    results, leaves = differentiable(outputs), differentiable(inputs)
    if results and leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results], allow_unused=True)


# --- evaluation ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the lowering gave for a call: numpy arrays, or the exception it raised while it was traced."""

    call: Call
    result: Any
    error: Exception | None


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    dtype = numpy_dtype(tensor.dtype)
    if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")):
        return tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy().view(dtype)
    return tensor.numpy()


def evaluate(calls: Sequence[Call], *, chunk: int = 64) -> list[Outcome]:
    """Every call's lowering, traced as the replay traces it; the calls of a chunk share one compilation, where the time goes."""
    outcomes: list[Outcome] = []
    with jax.enable_x64(True):
        for start in range(0, len(calls), chunk):
            outcomes += _evaluate_together(calls[start : start + chunk])
    return outcomes


# Checks of meaning leave the compiler's more expensive passes out.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _evaluate_together(calls: Sequence[Call]) -> list[Outcome]:
    errors: dict[int, Exception] = {}
    arrays: list[list[np.ndarray[Any, Any]]] = []
    builders: list[Callable[[Sequence[jax.Array]], Any]] = []
    for one in calls:
        kwargs = {name: value for name, value in one.kwargs.items() if name not in STORAGE_ARGUMENTS}
        leaves, spec = tree_flatten((one.args, kwargs))
        arrays.append([to_numpy(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)])
        builders.append(_builder(one.overload, leaves, spec))

    def program(inputs: list[list[jax.Array]]) -> list[Any]:
        results = []
        for position, (build, given) in enumerate(zip(builders, inputs, strict=True)):
            try:
                results.append(build(given))
            except Exception as error:  # noqa: BLE001 - a failing lowering is an outcome of its own, not the end of the run
                errors[position] = error
                results.append(None)
        return results

    compiled = jax.jit(program).lower(arrays).compile(compiler_options=QUICK)
    results = jax.tree.map(np.asarray, compiled(arrays))
    return [Outcome(one, result, errors.get(i)) for i, (one, result) in enumerate(zip(calls, results, strict=True))]


def _builder(overload: OpOverload, leaves: list[Any], spec: Any) -> Callable[[Sequence[jax.Array]], Any]:
    def build(given: Sequence[jax.Array]) -> Any:
        arrays = iter(given)
        filled = [
            next(arrays)
            if isinstance(leaf, torch.Tensor)
            else (numpy_dtype(leaf) if isinstance(leaf, torch.dtype) else leaf)
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(filled, spec)
        return LOWERINGS[overload].function(*args, **kwargs)

    return build
