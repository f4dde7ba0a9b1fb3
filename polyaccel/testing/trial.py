"""What `polyaccel test` runs in the processes of an engine: a small training under the configuration in force, held against numpy.

    polyaccel launch --backend NAME -m polyaccel.testing.trial [DIALECT] REPORT

Every form of a step trains the same linear model on the same rows, over the mesh, in the precision and with the accumulation that
are configured; each loss and the final weights are compared with those of float64. Process 0 appends a JSON line per stage to REPORT.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyaccel import Accelerator
from polyaccel.case import Case
from polyaccel.registry import load_backend
from polyaccel.testing.cases import case_for
from polyaccel.testing.findings import Report, bad, good, nobody, writer
from polyaccel.testing.reference import BIAS, LR, WEIGHT, number, on_host, reference

STAGES = ("open", "value", "function", "train_step", "gather")
_FORMS = {
    "value": "backward(loss)",
    "function": "backward(loss_fn, model, batch)",
    "train_step": "train_step(...)",
}
ROWS = 4  # of one data shard in a micro batch
EPOCHS = 2
_MAX_NORM = 0.5


@dataclass(frozen=True, slots=True)
class _Tolerance:
    relative: float
    reason: str


# Of one part in 2**8 (bfloat16) or 2**11 (float16) per product; in float32 about 1e-7 per operation, some hundred of them in a row.
_TOLERANCES = {
    "no": _Tolerance(2e-5, "float32"),
    "bf16": _Tolerance(3e-2, "bfloat16"),
    "fp16": _Tolerance(5e-3, "float16"),
}
# Accelerators multiply float32 in shorter formats unless they are told not to (TF32 has 10 bits of mantissa, TPUs use bfloat16).
_GPU_KINDS = ("cuda", "gpu", "nvidia", "amd", "mps")
_GPU = _Tolerance(5e-3, "float32, products in TF32")
_TPU = _Tolerance(3e-2, "float32, products in bfloat16")


def run(report: Report, dialect: str | None = None) -> bool:
    """Run all stages in the engine's dialect, or another; True if all went well. Every process of the job must call it."""
    stage = "open"
    try:
        accelerator = Accelerator()
        say = report if accelerator.is_main_process else nobody
        case = case_for(accelerator.backend, dialect)
        is_native = case.dialect == load_backend(accelerator.backend).capabilities.dialect
        takes_values = "backward_value" in load_backend(accelerator.backend).capabilities.features
        tolerance = _tolerance(accelerator)
        say(good(stage, f"{_job(accelerator)}; within {tolerance.relative:g} ({tolerance.reason})"))
        for stage in ("value", "function", "train_step"):
            # Loss values of torch can be differentiated on every engine: a bridge records how they came about.
            if stage == "value" and not (takes_values if is_native else case.dialect == "torch"):
                say(good(stage, "the engine differentiates functions, not values: the forms below are the ones to use"))
                continue
            start = time.perf_counter()
            losses, apart = _train(accelerator, case, stage, tolerance)
            say(
                good(
                    stage,
                    f"{len(losses)} losses and the weights differ from numpy by at most {apart:.1e}"
                    f", {time.perf_counter() - start:.1f} s",
                )
            )
        stage = "gather"
        say(good(stage, _gather(accelerator, case)))
        return True
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is the finding
        report(bad(stage, error))
    return False


def _job(accelerator: Accelerator) -> str:
    plan, topology = accelerator.plan, accelerator.state
    words = [f"{topology.num_processes} process{'' if topology.num_processes == 1 else 'es'}"]
    words.append(f"{topology.num_devices} x {topology.device_kind}")
    words.append(f"{plan.num_data_shards} data shard{'' if plan.num_data_shards == 1 else 's'}")
    sharded = [f"mesh.{axis}={size}" for axis, size in plan.mesh.sizes.items() if axis != "data" and size > 1]
    words += sharded
    if accelerator.mixed_precision != "no":
        words.append(f"mixed_precision={accelerator.mixed_precision}")
    if accelerator.gradient_accumulation_steps > 1:
        words.append(f"{accelerator.gradient_accumulation_steps} batches per update")
    return ", ".join(words)


def _tolerance(accelerator: Accelerator) -> _Tolerance:
    kind = accelerator.state.device_kind.lower()
    if accelerator.mixed_precision == "no" and "tpu" in kind:
        return _TPU
    if accelerator.mixed_precision == "no" and any(maker in kind for maker in _GPU_KINDS):
        return _GPU
    return _TOLERANCES[accelerator.mixed_precision]


def _train(accelerator: Accelerator, case: Case, form: str, tolerance: _Tolerance) -> tuple[list[float], float]:
    """The losses of one form, and the greatest difference from the reference. Raises ArithmeticError above the tolerance."""
    accumulate, shards = accelerator.gradient_accumulation_steps, accelerator.num_data_shards
    # Two whole accumulation windows and a short one at the end of the loader.
    count = 2 * accumulate + 1
    rows = np.random.default_rng(3)
    x = rows.normal(size=(ROWS * shards * count, len(WEIGHT))).astype(np.float32)
    y = rows.normal(size=(len(x), len(BIAS))).astype(np.float32)
    model = case.model(WEIGHT, BIAS)
    loader = case.loader(x, y, ROWS * shards if accelerator.plan.split_batches else ROWS)
    prepared = accelerator.prepare(model, case.optimizer(model, LR), loader)
    losses, skipped = _losses(accelerator, form, case, *prepared)
    expected, weight, bias = reference(
        epochs=EPOCHS, accumulate=accumulate, max_norm=_MAX_NORM, skipped=skipped, x=x, y=y, global_batch=ROWS * shards
    )
    weights = case.weights(accelerator.unwrap_model(prepared[0]))
    apart = 0.0
    for name, mine, theirs in (
        ("loss", losses, expected),
        ("weight", weights["weight"], weight),
        ("bias", weights["bias"], bias),
    ):
        apart = max(apart, _difference(form, name, np.asarray(mine, np.float64), np.asarray(theirs), tolerance))
    return losses, apart


def _losses(
    accelerator: Accelerator, form: str, case: Case, model: Any, optimizer: Any, loader: Any
) -> tuple[list[float], list[int]]:
    """Every loss as its mean over the processes, and after which of them an update was skipped (float16 looks for its scale)."""
    losses: list[float] = []
    skipped: list[int] = []
    step = (
        accelerator.train_step(case.loss, model, optimizer, max_grad_norm=_MAX_NORM) if form == "train_step" else None
    )
    for _ in range(EPOCHS):
        for batch in loader:
            if step is not None:
                loss = step(batch)
                is_update = accelerator.sync_gradients
            else:
                with accelerator.accumulate(model):
                    is_update = accelerator.sync_gradients
                    if form == "function":
                        loss = accelerator.backward(case.loss, model, batch)
                    else:
                        loss = case.loss(model, batch)
                        accelerator.backward(loss)
                    if is_update:
                        accelerator.clip_grad_norm_(case.parameters(model), _MAX_NORM)
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(number(accelerator.reduce(loss, "mean") if accelerator.num_processes > 1 else loss))
            if is_update and accelerator.optimizer_step_was_skipped:
                skipped.append(len(losses) - 1)
    return losses, skipped


def _difference(form: str, name: str, mine: Any, theirs: Any, tolerance: _Tolerance) -> float:
    """The greatest difference, relative to the greatest of the reference's numbers."""
    if mine.shape != theirs.shape:
        raise ArithmeticError(f"{_FORMS[form]} gave {name} of shape {mine.shape}, numpy has {theirs.shape}")
    gaps = np.abs(mine - theirs) / np.abs(theirs).max()
    wrong = np.flatnonzero(~(gaps <= tolerance.relative))  # NaN is wrong, too
    if len(wrong):
        raise ArithmeticError(
            f"{_FORMS[form]}: {name}[{wrong[0]}] is {mine.flat[wrong[0]]:.6g}, and numpy computes {theirs.flat[wrong[0]]:.6g}"
            f" (they may differ by {tolerance.relative:g}, {tolerance.reason})"
        )
    return float(gaps.max())


def _gather(accelerator: Accelerator, case: Case) -> str:
    """Every sample of a loader that does not divide comes back once and in order, and objects of every process reach all."""
    shards = accelerator.num_data_shards
    x = np.arange(3 * (ROWS * shards + 1), dtype=np.float32).reshape(-1, 3)
    batch_size = ROWS * shards if accelerator.plan.split_batches else ROWS
    loader = accelerator.prepare_data_loader(case.loader(x, x[:, :2], batch_size))
    seen = [on_host(accelerator.gather_for_metrics(batch["x"])) for batch in loader]
    if accelerator.plan.even_batches and not np.array_equal(np.concatenate(seen), x):
        raise ArithmeticError(f"gather_for_metrics gave {sum(map(len, seen))} samples of {len(x)}, or in another order")
    found = accelerator.gather_object([accelerator.process_index])
    if sorted(found) != list(range(accelerator.num_processes)):
        raise ArithmeticError(f"{accelerator.num_processes} processes gathered {found}")
    return f"{len(x)} samples came back once each; every process heard from {len(found)}"


def main() -> int:
    """Run the stages and write them down; the exit code says whether all went well."""
    *dialect, path = sys.argv[1:]
    return 0 if run(writer(path), *dialect) else 1


if __name__ == "__main__":
    sys.exit(main())
