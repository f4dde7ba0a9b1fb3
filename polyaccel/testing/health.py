"""What `polyaccel doctor` runs in the processes of an engine: open it, train one tiny step, sum over processes, and report.

    polyaccel launch --backend NAME -m polyaccel.testing.health REPORT

Process 0 appends one JSON line per stage to REPORT as soon as it is through it.
"""

from __future__ import annotations

import sys
import time

from polyaccel import Accelerator
from polyaccel.registry import load_backend
from polyaccel.testing.findings import Report, bad, good, nobody, writer
from polyaccel.testing.reference import BIAS, LR, WEIGHT, X, Y

ROWS = 8


def check(report: Report) -> bool:
    """Run all stages; True if all went well. Every process of the job must call it."""
    stage = "open"
    try:
        accelerator = Accelerator()
        say = report if accelerator.is_main_process else nobody
        count = accelerator.num_processes
        say(good(stage, f"{accelerator.backend}, {count} process{'' if count == 1 else 'es'}"))
        stage, topology = "devices", accelerator.state
        say(good(stage, f"{topology.num_devices} x {topology.device_kind}"))
        stage = "step"
        start = time.perf_counter()
        before, after = _train(accelerator)
        if not after < before:
            raise ArithmeticError(f"a step of SGD took the loss from {before:.6g} to {after:.6g}")
        say(good(stage, f"loss {before:.4g} -> {after:.4g}, {time.perf_counter() - start:.1f} s"))
        stage = "collective"
        found = accelerator.gather_for_metrics([accelerator.process_index])
        if sorted(found) != list(range(accelerator.num_processes)):
            raise ArithmeticError(f"{accelerator.num_processes} processes gathered {found}")
        say(good(stage, f"every process heard from {len(found)}"))
        return True
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        report(bad(stage, error))
    return False


def _train(accelerator: Accelerator) -> tuple[float, float]:
    """Loss before and after one step of a linear model, in the dialect that the engine speaks natively."""
    case = load_backend(accelerator.backend).case()
    model = case.model(WEIGHT, BIAS)
    model, optimizer = accelerator.prepare(model, case.optimizer(model, LR))
    rows = [index % len(X) for index in range(ROWS * accelerator.num_data_shards)]
    batch = next(iter(accelerator.prepare_data_loader(case.loader(X[rows], Y[rows], ROWS))))
    losses = []
    for _ in range(2):
        losses.append(float(accelerator.backward(case.loss, model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[1]


def main() -> int:
    """Run the stages and write them down; the exit code says whether all went well."""
    return 0 if check(writer(sys.argv[1])) else 1


if __name__ == "__main__":
    sys.exit(main())
