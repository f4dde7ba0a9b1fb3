"""Holds one OpInfo operation against torch: captured forward and backward by our own capture, replayed by jax under jit.

Every sample is its own captured program; the programs of one operation and dtype share a compilation, where the time goes.
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from lowering_comparison import TOLERANCE, Array, as_exact_as, exact, scaled_error
from lowering_harness import QUICK, spread, to_numpy
from torch.utils._pytree import tree_flatten, tree_unflatten

from polyaccel.errors import PolyaccelError
from polyaccel_bridges.capture import capture_forward, capture_vjp
from polyaccel_bridges.graphs import ForwardGraph, TensorSpec, VjpGraph
from polyaccel_bridges.lowerings.promotion import NUMPY_OF_TORCH
from polyaccel_bridges.programs import Program
from polyaccel_bridges.replay import exact_dtypes, run_forward, run_vjp_backward, run_vjp_forward

# The dtypes of a row, and how many of an operation's samples are run in each: the first half, then as many from further back.
SAMPLES = {torch.float32: 8, torch.bfloat16: 3, torch.complex64: 3, torch.int64: 2, torch.bool: 2}

# Memory that nobody wrote: shape and dtype are what torch promises.
UNDEFINED = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})

# Operations that give positions: which of several equal elements they name, torch leaves open.
PICKING = frozenset({"sort", "msort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode"})


@dataclass(slots=True)
class Row:
    """What the samples of one operation in one dtype gave; errors are scaled as `lowering_comparison.scaled_error` says."""

    agree: int = 0
    forward: float = 0.0
    backward: float | None = None
    by_float64: int = 0
    is_random: bool = False
    refused: Counter[str] = field(default_factory=Counter)
    differ: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sample:
    """One call as torch made it: its tensors, its results, and its gradients for the cotangents that go with it."""

    call: Callable[..., list[torch.Tensor]]
    tensors: list[torch.Tensor]
    outputs: list[torch.Tensor]
    cotangents: list[torch.Tensor | None]
    grads: list[torch.Tensor | None]
    description: str

    @property
    def is_differentiated(self) -> bool:
        return any(cotangent is not None for cotangent in self.cotangents)


@dataclass(frozen=True, slots=True)
class Captured:
    sample: Sample
    graph: VjpGraph | ForwardGraph

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.graph.forward, self.graph.backward) if isinstance(self.graph, VjpGraph) else (self.graph.program,)

    def run(self, arrays: Sequence[Any], cotangents: Sequence[Any], key: jax.Array) -> tuple[list[Any], list[Any]]:
        """The outputs, and the gradient of each tensor (None where it has none)."""
        if isinstance(self.graph, ForwardGraph):
            return run_forward(self.graph, {}, {}, arrays, key)[0], []
        outputs, _, residuals = run_vjp_forward(self.graph, {}, {}, arrays, key)
        return outputs, run_vjp_backward(self.graph, residuals, cotangents)[1]


def check(
    operation: Any, dtype: torch.dtype, reached: Counter[str] | None = None, count: int | None = None
) -> Row | None:
    """The row of `operation` in `dtype`, or None where no sample of it exists; `reached` counts the lowerings it came through."""
    row = Row()
    captured = []
    for sample in samples_of(operation, dtype, count or SAMPLES[dtype]):
        try:
            captured.append(_capture(sample))
        except Exception as error:  # noqa: BLE001 - what cannot be captured is a result of its own
            row.refused[reason_of(error)] += 1
    used: set[str] = set()
    for one, result in zip(captured, _replay(captured), strict=True):
        _enter(row, operation.name, one, result)
        used.update(step.name for program in one.programs for step in program.instructions)
    if reached is not None:
        reached.update(used)
    return row if row.agree or row.refused or row.differ else None


def reason_of(error: BaseException) -> str:
    """The error in one line without the place it names, which here is this file."""
    lines = str(error).splitlines() or [""]
    if "no lowering to jax" in lines[0]:
        return "; ".join(
            dict.fromkeys(_without_place(line.strip(), True) for line in lines[1:] if line.startswith("  "))
        )
    text = _without_place(lines[0], False)
    return text if isinstance(error, PolyaccelError) else f"{type(error).__name__}: {text}"


def _without_place(line: str, names_operation: bool) -> str:
    if names_operation:
        name, _, rest = line.partition(" ")
        own = rest.partition("operation.op(first, *args, **kwargs))")[2].removeprefix(": ")
        return f"{name}: {own}" if own else f"{name} has no lowering"
    return re.split(r", so the model is no fixed program|; outside any module|: outside any module| \(outside", line)[
        0
    ][:200]


# --- torch's side ----------------------------------------------------------------------------------------------------------------


def samples_of(operation: Any, dtype: torch.dtype, count: int) -> Iterator[Sample]:
    """Samples that torch itself can run; sparse and quantized tensors, which jax does not have, are left out."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # some of torch's sample functions draw from it
    differentiable = operation.supports_autograd and dtype in operation.supported_backward_dtypes("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated and experimental operations announce themselves
        generated = iter(operation.sample_inputs_func(operation, "cpu", dtype, differentiable))
        for index, drawn in enumerate(_until_error(spread(generated, count))):
            sample = _as_torch_runs_it(operation, drawn, index)
            if sample is not None:
                yield sample


def _until_error(samples: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from samples
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return  # the sample function itself needs CUDA or another dtype


def _as_torch_runs_it(operation: Any, drawn: Any, index: int) -> Sample | None:
    leaves, spec = tree_flatten((drawn.input, drawn.args, drawn.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(t.layout is not torch.strided or t.is_quantized or t.dtype not in NUMPY_OF_TORCH for t in tensors):
        return None

    def call(*given: torch.Tensor) -> list[torch.Tensor]:
        arrived = iter(given)
        filled = [next(arrived) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        first, args, kwargs = tree_unflatten(filled, spec)
        result = drawn.output_process_fn_grad(operation.op(first, *args, **kwargs))
        return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]

    plain = [
        t.detach().resolve_conj().resolve_neg().contiguous().clone().requires_grad_(t.requires_grad) for t in tensors
    ]
    try:
        outputs, cotangents, grads = _run(call, plain, index)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, IndexError):
        return None
    if any(o.layout is not torch.strided or o.is_quantized or o.dtype not in NUMPY_OF_TORCH for o in outputs):
        return None
    values = ", ".join(_shown(leaf) for leaf in leaves)
    return Sample(call, plain, outputs, cotangents, grads, f"sample {index}: ({values})")


def _run(
    call: Callable[..., list[torch.Tensor]], tensors: list[torch.Tensor], index: int
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Outputs, a cotangent for each that has a gradient, and the gradient of each tensor."""
    torch.default_generator.manual_seed(index)
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    outputs = call(*leaves)
    draw = torch.Generator().manual_seed(index)
    cotangents = [
        # drawn as float32 in every dtype, so that the float64 run gets the same ones
        _normal(output, draw).to(output.dtype) if output.requires_grad else None
        for output in outputs
    ]
    grads: list[torch.Tensor | None] = [None] * len(leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    heads = [output for output in outputs if output.requires_grad]
    if heads and wanted:
        found = iter(torch.autograd.grad(heads, wanted, [c for c in cotangents if c is not None], allow_unused=True))
        grads = [_dense(next(found)) if leaf.requires_grad else None for leaf in leaves]
    return [output.detach() for output in outputs], cotangents, grads


def _dense(grad: torch.Tensor | None) -> torch.Tensor | None:
    return torch.zeros(grad.shape, dtype=grad.dtype) if grad is not None and grad._is_zerotensor() else grad


def _normal(output: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    kind = torch.complex64 if output.dtype.is_complex else torch.float32
    # values that bfloat16 holds exactly: the same cotangents in every dtype
    drawn = torch.randn(output.shape, generator=draw, dtype=kind)
    return drawn if kind is torch.complex64 else drawn.bfloat16().float()


def _shown(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return str(leaf)[:60]


# --- our side --------------------------------------------------------------------------------------------------------------------


def _capture(sample: Sample) -> Captured:
    specs = [TensorSpec(tuple(t.shape), t.dtype, t.requires_grad) for t in sample.tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sample.is_differentiated:
            return Captured(sample, capture_vjp(sample.call, {}, specs, autocast=None))
        return Captured(sample, capture_forward(sample.call, {}, specs, autocast=None))


def _replay(captured: Sequence[Captured]) -> list[Any]:
    """Per program its outputs and gradients as numpy arrays, or the exception that its replay raised."""
    errors: dict[int, Exception] = {}
    inputs = [
        ([to_numpy(t) for t in one.sample.tensors], [None if c is None else to_numpy(c) for c in one.sample.cotangents])
        for one in captured
    ]

    def program(given: Any) -> list[Any]:
        results = []
        for position, (one, (arrays, cotangents)) in enumerate(zip(captured, given, strict=True)):
            try:
                results.append(one.run(arrays, cotangents, jax.random.key(0)))
            except Exception as error:  # noqa: BLE001 - a failing lowering is an outcome of its own, not the end of the run
                errors[position] = error
                results.append(None)
        return results

    with exact_dtypes():
        compiled = jax.jit(program).lower(inputs).compile(compiler_options=QUICK)
        results = jax.tree.map(np.asarray, compiled(inputs))
    return [errors.get(index, result) for index, result in enumerate(results)]


def _enter(row: Row, name: str, one: Captured, result: Any) -> None:
    sample = one.sample
    if isinstance(result, Exception):
        row.differ.append(f"{sample.description}: {reason_of(result)}")
        return
    outputs, grads = result
    random_draw = any(program.draws_randomly for program in one.programs)
    wanted = [to_numpy(output) for output in sample.outputs]
    reason = _shapes_differ(wanted, outputs)
    if reason is None and isinstance(one.graph, VjpGraph):
        reason = _grads_missing(sample.grads, grads)
    if reason is not None:
        row.differ.append(f"{sample.description}: {reason}")
        return
    if random_draw or name in UNDEFINED:
        row.is_random = True
        row.agree += 1
        return
    pairs = [(to_numpy(want), have) for want, have in zip(sample.grads, grads, strict=False) if want is not None]
    forward = max(map(scaled_error, wanted, outputs), default=0.0)
    backward = max((scaled_error(*pair) for pair in pairs), default=0.0)
    everything = [*zip(wanted, outputs, strict=True), *pairs]
    if not all(scaled_error(*pair) <= TOLERANCE.get(pair[0].dtype.name, 0.0) for pair in everything):
        if name in PICKING and _picks_the_same_values(name, sample, outputs, grads):
            row.agree += 1
            return
        if not _is_as_exact_as_torch(sample, everything):
            row.differ.append(f"{sample.description}: forward {forward:.1e}, backward {backward:.1e}")
            return
        row.by_float64 += 1
    else:
        row.forward = max(row.forward, forward)
        if pairs:
            row.backward = max(row.backward or 0.0, backward)
    row.agree += 1


def _shapes_differ(wanted: Sequence[Array], given: Sequence[Array]) -> str | None:
    if len(wanted) != len(given):
        return f"{len(given)} results instead of {len(wanted)}"
    for want, have in zip(wanted, given, strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            return f"{have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    return None


def _grads_missing(wanted: Sequence[torch.Tensor | None], given: Sequence[Array | None]) -> str | None:
    for want, have in zip(wanted, given, strict=True):
        if (want is None) != (have is None):
            return "a gradient is missing" if have is None else "a gradient that torch does not give"
        if (
            want is not None
            and have is not None
            and (to_numpy(want).shape, to_numpy(want).dtype) != (have.shape, have.dtype)
        ):
            return f"a gradient of {have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    return None


_WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}


def _is_as_exact_as_torch(sample: Sample, pairs: list[tuple[Array, Array]]) -> bool:
    """Long sums are rounded differently; then torch in float64 decides, on the same numbers."""
    index = int(sample.description.split()[1].rstrip(":"))
    widened = [t.detach().to(_WIDE.get(t.dtype, t.dtype)).requires_grad_(t.requires_grad) for t in sample.tensors]
    try:
        outputs, _, grads = _run(sample.call, widened, index)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    truths = [exact(to_numpy(t)) for t in (*outputs, *(g for g in grads if g is not None))]
    # Cotangents are of size 1: what cancels to zero keeps a few of their last digits.
    noise = 8 * max((torch.finfo(t.dtype).eps for t in sample.outputs if t.dtype in _WIDE), default=0.0)
    return as_exact_as([want for want, _ in pairs], [have for _, have in pairs], truths, noise)


# --- results of which there is more than one -------------------------------------------------------------------------------------


def _picks_the_same_values(name: str, sample: Sample, outputs: Sequence[Array], grads: Sequence[Array | None]) -> bool:
    """For operations that pick elements: equal ones may be picked in any order, and gradients follow the picked ones."""
    source = to_numpy(sample.tensors[0])
    if sample.outputs[-1].dtype is not torch.int64 or name == "msort":  # values alone, sorted along the first dim
        same = np.array_equal(exact(to_numpy(sample.outputs[0])), exact(outputs[0]), equal_nan=True)
        want, have = sample.grads[0], grads[0] if grads else None
        return same and (want is None or have is None or _same_up_to_ties(source, to_numpy(want), have, 0))
    wanted, position = to_numpy(sample.outputs[-1]), sample.outputs[-1].dim() - source.ndim
    for dim in range(source.ndim):
        theirs, ours = (np.expand_dims(x, dim) if position else x for x in (wanted, outputs[-1]))
        if any(theirs.shape[i] != source.shape[i] for i in range(source.ndim) if i != dim):
            continue
        if max(theirs.max(initial=0), ours.max(initial=0)) >= source.shape[dim]:
            continue
        picked, own = (np.take_along_axis(source, index, dim) for index in (theirs, ours))
        if not _are_values(picked, sample.outputs, dim, position) or not np.array_equal(
            exact(picked), exact(own), equal_nan=True
        ):
            continue
        if len(outputs) == 2 and scaled_error(to_numpy(sample.outputs[0]), outputs[0]) != 0:
            return False
        if theirs.shape[dim] > 1 and (np.diff(np.sort(ours, axis=dim), axis=dim) == 0).any():
            return False  # an element is picked twice
        want, have = sample.grads[0], grads[0] if grads else None
        return want is None or have is None or _same_up_to_ties(source, to_numpy(want), have, dim)
    return False


def _are_values(picked: Array, outputs: Sequence[torch.Tensor], dim: int, position: int) -> bool:
    if len(outputs) == 1:
        return True
    values = to_numpy(outputs[0])
    return np.array_equal(exact(np.expand_dims(values, dim) if position else values), exact(picked), equal_nan=True)


def _same_up_to_ties(source: Array, want: Array, have: Array, dim: int) -> bool:
    def ordered(grads: Array) -> Array:
        lines, along = (np.moveaxis(exact(x), dim, -1) for x in (source, grads))
        return np.take_along_axis(along, np.lexsort((along, lines), axis=-1), -1)

    return np.allclose(ordered(want), ordered(have), rtol=TOLERANCE[want.dtype.name], atol=1e-6)
