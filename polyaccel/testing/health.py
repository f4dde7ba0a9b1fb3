"""What `polyaccel doctor` runs in the processes of an engine: open it, train one tiny step, sum over processes, and report.

    polyaccel launch --backend NAME -m polyaccel.testing.health REPORT

Process 0 appends one JSON line per stage to REPORT as soon as it is through it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polyaccel import Accelerator
from polyaccel.errors import PolyaccelError
from polyaccel.registry import load_backend

ROWS, COLUMNS = 8, 3


def check(report: Callable[[dict[str, Any]], None]) -> bool:
    """Run all stages; True if all went well. Every process of the job must call it."""
    stage = "open"
    try:
        accelerator = Accelerator()
        say = report if accelerator.is_main_process else _say_nothing
        say(_good(stage, f"{accelerator.backend}, {accelerator.num_processes} process(es)"))
        stage, topology = "devices", accelerator.state
        say(_good(stage, f"{topology.num_devices} x {topology.device_kind}"))
        stage = "step"
        start = time.perf_counter()
        before, after = _train(accelerator)
        if not after < before:
            raise ArithmeticError(f"a step of SGD took the loss from {before:.6g} to {after:.6g}")
        say(_good(stage, f"loss {before:.4g} -> {after:.4g}, {time.perf_counter() - start:.1f} s"))
        stage = "collective"
        found = accelerator.gather_for_metrics([accelerator.process_index])
        if sorted(found) != list(range(accelerator.num_processes)):
            raise ArithmeticError(f"{accelerator.num_processes} processes gathered {found}")
        say(_good(stage, f"every process heard from {len(found)}"))
        return True
    except PolyaccelError as error:
        report({"stage": stage, "is_good": False, "words": error.message, "cure": error.hint or ""})
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        words = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        report(
            {
                "stage": stage,
                "is_good": False,
                "words": words,
                "cure": "see `polyaccel env`, and reinstall the framework",
            }
        )
    return False


def _train(accelerator: Accelerator) -> tuple[float, float]:
    """Loss before and after one step of a linear model, in the dialect that the engine speaks natively."""
    data = np.random.default_rng(0).normal(size=(ROWS * accelerator.num_data_shards, COLUMNS)).astype(np.float32)
    tiny = load_backend(accelerator.backend).tiny_training(data, ROWS)
    model, optimizer = accelerator.prepare(tiny.model, tiny.optimizer)
    batch = next(iter(accelerator.prepare_data_loader(tiny.loader)))
    losses = []
    for _ in range(2):
        losses.append(float(accelerator.backward(tiny.loss_fn, model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[1]


def _good(stage: str, words: str) -> dict[str, Any]:
    return {"stage": stage, "is_good": True, "words": words}


def _say_nothing(finding: dict[str, Any]) -> None:
    """For processes whose success is told by process 0."""


def main() -> int:
    """Run the stages and write them down; the exit code says whether all went well."""
    path = Path(sys.argv[1])

    def report(finding: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(finding), file=file, flush=True)

    return 0 if check(report) else 1


if __name__ == "__main__":
    sys.exit(main())
