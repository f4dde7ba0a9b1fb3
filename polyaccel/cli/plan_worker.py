"""The process of one plan: runs the script up to its first update, and writes what the compiler said. Started by `polyaccel plan`."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import runpy
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyaccel.errors import PolyaccelError
from polyaccel.looking.devices import peak_of
from polyaccel.planned.chips import Chip
from polyaccel.planned.report import as_json
from polyaccel.planned.topologies import topology_named
from polyaccel.registry import choose_backend
from polyaccel.tracking.session import without_runs

_TORCH = frozenset({"torch", "torchvision", "transformers", "timm"})


def main(arguments: list[str]) -> int:
    """`pipe topology report script [its arguments]`: 0 when the report is written. At the end of the pipe all of this ends."""
    pipe, topology, report, script, *rest = arguments
    threading.Thread(target=_end_with, args=(int(pipe),), daemon=True).start()
    backend: Any = choose_backend("jax")
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).resolve().parent)  # as Python does for a script
    try:
        planning = backend.planner().planning(topology_named(topology))
        with planning as session, without_runs(), _without_weights(Path(script)):
            _run(script)
        plan, chip = session.step_plan(), _with_peak(session.chip())
    except PolyaccelError as error:
        print(error, file=sys.stderr)
        return 1
    Path(report).write_text(json.dumps(as_json(plan, chip)), "utf-8")
    return 0


def _end_with(pipe: int) -> None:
    """End this process and those of its loaders when whoever holds the other end is gone; compiles run for minutes."""
    os.read(pipe, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _with_peak(chip: Chip | None) -> Chip | None:
    """A GPU says its name, and a table what those of that name can do."""
    if chip is None or chip.peak_flops is not None:
        return chip
    peak = peak_of(chip.name)
    return chip if peak is None else replace(chip, peak_flops=peak.flops, source=peak.source)


def _run(script: str) -> None:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise


def _without_weights(script: Path) -> AbstractContextManager[None]:
    """A script that imports torch makes modules without memory; jax's own are made on the devices by `create_model`."""
    from polyaccel.big_models import init_empty_weights

    names = set()
    for node in ast.walk(ast.parse(script.read_text("utf-8"), str(script))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names.add(node.module.partition(".")[0])
    is_torch = names & _TORCH and "flax" not in names and importlib.util.find_spec("torch") is not None
    return init_empty_weights() if is_torch else nullcontext()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
