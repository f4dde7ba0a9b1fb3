"""Trains one architecture by torch and by jax through the public API, on equal weights and batches, and compares the losses."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from architecture_case import Batch, Case
from torch import nn

from polyaccel import Accelerator
from polyaccel.errors import PolyaccelError
from polyaccel_bridges.programs import Program

TOLERANCE = 1e-4  # relative, of every loss of the run
GRADIENT_TOLERANCE = 1e-3  # of each parameter's largest gradient in the first step
GRADIENT_FLOOR = (
    1e-3  # of the largest gradient of all: a key's bias, say, has gradient 0, and rounding noise in its place
)
FLOAT64_TOLERANCE = (
    1e-6  # what a float64 run keeps where only rounding told the float32 runs apart; some models keep float32 parts
)
LEARNING_RATE = 1e-3

MakeAccelerator = Callable[[str], Any]


@dataclass(frozen=True)
class Run:
    """The losses of one run; `compile_s` is the CPU time of the first two steps beyond that of the usual one.

    `gradients` are those of the first step, by name. Adam hides how large a gradient is, so the losses alone would not show it.
    """

    losses: list[float]
    compile_s: float
    gradients: dict[str, torch.Tensor]


def make_accelerator(backend: str) -> Accelerator:
    """An Accelerator on the CPU that compiles what it needs: compile times are measured."""
    return Accelerator(backend=backend, cpu=True, compilation_cache="off")


def train(case: Case, model: nn.Module, accelerator: Any, steps: int, dtype: torch.dtype = torch.float32) -> Run:
    """`steps` AdamW steps of a copy of `model`, as an Accelerate script takes them."""
    model = copy.deepcopy(model).to(dtype).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    seconds: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        batch = batch_of(case, step, dtype)
        start = time.process_time()
        loss = case.loss(model(**batch), batch)
        accelerator.backward(loss)
        if step == 0:
            gradients = {name: _host(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.process_time() - start)
    usual = statistics.median(seconds[2:] or seconds)
    return Run(losses, sum(max(0.0, taken - usual) for taken in seconds[:2]), gradients)


def _host(gradient: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gradient.detach().cpu().numpy().copy()).double()


def batch_of(case: Case, step: int, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch of a step, its floating tensors in `dtype`."""
    torch.manual_seed(1000 + step)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.batch(step).items()}


def built(case: Case) -> nn.Module:
    """The case's model, the same in every call. Raises ValueError where its forward is random: nothing could be compared."""
    torch.manual_seed(0)
    model = case.build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a few heads have a rate of their own that no configuration reaches
    batch = batch_of(case, 0)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        probe = copy.deepcopy(model)
        with torch.no_grad():
            losses.append(float(case.loss(probe(**copy.deepcopy(batch)), batch)))
    if not math.isclose(*losses, rel_tol=1e-5):  # a random order, of patches say, changes the rounding alone
        raise ValueError(f"{case.name}: two forwards of one batch give {losses}: some dropout is on")
    return model


def difference(ours: list[float], reference: list[float]) -> float:
    """The largest relative difference of two curves; infinite where one of them is not finite."""
    if not all(map(math.isfinite, [*ours, *reference])):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, reference, strict=True))


def gradient_difference(ours: Run, reference: Run) -> float:
    """The largest difference of first gradients, relative to each parameter's largest; no gradient counts as 0."""
    largest = max(float(gradient.abs().max()) for gradient in reference.gradients.values() if gradient.numel())
    worst = 0.0
    for name in ours.gradients.keys() | reference.gradients.keys():
        a, b = ours.gradients.get(name), reference.gradients.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        if a.numel():
            scale = max(float(b.abs().max()), GRADIENT_FLOOR * largest)
            error = float((a - b).abs().max()) / scale
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def measure(case: Case, steps: int | None = None, make: MakeAccelerator = make_accelerator) -> dict[str, Any]:
    """The row of a case: status, difference, compile seconds, graph size.

    passed: within the tolerances. ill-conditioned: not, but in float64 jax follows torch within FLOAT64_TOLERANCE, so that rounding
    alone tells the curves apart; the reason shows how far torch's own float32 is from its float64. refused: an error of polyaccel, or
    the model's own under capture, quoted. failed: anything else.
    """
    steps = steps or case.steps
    model = built(case)
    row: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters()), "steps": steps}
    reference = train(case, model, make("torch"), steps)
    if len(set(reference.losses)) < steps:
        raise ValueError(f"{case.name}: the loss stands still ({reference.losses}): nothing would be compared")
    try:
        accelerator = make("jax")
        ours = train(case, model, accelerator, steps)
    except PolyaccelError as error:
        return row | {"status": "refused", "reason": str(error)}
    except Exception as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "was captured" in note]
        if not notes:
            raise
        return row | {"status": "refused", "reason": f"{type(error).__name__}: {error} ({notes[0]})"}
    row |= {
        "difference": difference(ours.losses, reference.losses),
        "gradients": gradient_difference(ours, reference),
        "compile_s": round(ours.compile_s, 1),
        "nodes": num_nodes(),
    }
    if row["difference"] <= TOLERANCE and row["gradients"] <= GRADIENT_TOLERANCE:
        return row | {"status": "passed", "reason": ""}
    try:
        exact = train(case, model, make("torch"), steps, torch.float64)
        ours_exact = train(case, model, make("jax"), steps, torch.float64)
    except (PolyaccelError, RuntimeError) as error:  # a model that converts itself to float32, for one
        return row | {"status": "failed", "reason": f"beyond the tolerance, and not comparable in float64: {error}"}
    exact_difference = max(difference(ours_exact.losses, exact.losses), gradient_difference(ours_exact, exact))
    own = max(difference(reference.losses, exact.losses), gradient_difference(reference, exact))
    facts = f"float64: jax against torch {exact_difference:.1e}; torch float32 against torch float64 {own:.1e}"
    return row | {"status": "ill-conditioned" if exact_difference <= FLOAT64_TOLERANCE else "failed", "reason": facts}


def num_nodes() -> int:
    """Operations in the captured programs that are alive in this process."""
    return sum(len(found.instructions) for found in gc.get_objects() if type(found) is Program)
