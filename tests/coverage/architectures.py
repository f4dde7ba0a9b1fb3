"""Runs the table of architectures: `python tests/coverage/architectures.py [--only REGEX] [--family F] [--write]`.

Each case runs in a process of its own with a time limit, so that a crash of one stops nothing. Results are merged into
architectures.json as they come; `--write` generates docs/architectures.md from it. The exit status is 1 where a case that ran here failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import architecture_table as table
from architecture_case import Case

MODULES = (
    "cases_text",
    "cases_experts",
    "cases_recurrent",
    "cases_vision",
    "cases_audio",
    "cases_multimodal",
    "cases_timm",
)
# Importing takes as long as many a case.
_BEFORE_THE_FORK = (
    "architecture_run",
    "polyaccel_torch.engine",
    "polyaccel_jax.engine",
    "polyaccel_bridges.torch_to_jax",
)


def cases() -> dict[str, Case]:
    """Every case by its name."""
    folder = Path(__file__).parent
    found: dict[str, Case] = {}
    for module in MODULES:
        if not (folder / f"{module}.py").exists():
            continue
        for case in import_module(module).CASES:
            if case.name in found:
                raise ValueError(f"two cases are called {case.name}")
            found[case.name] = case
    return found


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches, in any case of letters")
    parser.add_argument("--family", help="cases of this family")
    parser.add_argument(
        "--status", help="cases whose last result was this: passed, ill-conditioned, refused, failed, new"
    )
    parser.add_argument(
        "--write", action="store_true", help="generate docs/architectures.md; with no other option, run nothing"
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="per case (default 600)")
    parser.add_argument(
        "--quick", action="store_true", help="without XLA's expensive passes: half the time, and `seconds` is marked"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    asked = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
    if asked.quick:
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    known = cases()
    before = table.read()
    chosen = [
        case
        for case in known.values()
        if re.search(asked.only, case.name, re.IGNORECASE)
        and asked.family in (None, case.family)
        and asked.status in (None, last_status(before.get(case.name)))
    ]
    if asked.list:
        print("\n".join(f"{case.family}: {case.name}" for case in chosen))
        return 0
    failed = 0
    if not (asked.write and not (asked.only or asked.family or asked.status)):
        for number, case in enumerate(chosen, start=1):
            missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
            if missing:
                print(f"[{number}/{len(chosen)}] {case.name}: not run here, needs {', '.join(missing)}", flush=True)
                continue
            row = run(case, asked.timeout) | ({"quick": True} if asked.quick else {})
            table.merge([row], set(known))
            failed += row["status"] == "failed"
            print(f"[{number}/{len(chosen)}] {summary(row)}", flush=True)
    if asked.write:
        table.PAGE.write_text(table.page(table.read()), encoding="utf-8")
    return 1 if failed else 0


def last_status(row: table.Row | None) -> str:
    """The status of a row; a case that has none, or was measured before gradients were compared, is new."""
    return "new" if row is None or ("difference" in row and "gradients" not in row) else row["status"]


def run(case: Case, timeout: float) -> table.Row:
    """The row of a case, measured in a process of its own, forked where the frameworks are imported and nothing has run yet."""
    for module in _BEFORE_THE_FORK:
        import_module(module)
    row: table.Row = {
        "name": case.name,
        "family": case.family,
        "note": case.note,
        "params": 0,
        "versions": {name: version(name) for name in ("torch", "jax", *case.needs)},
    }
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as said:
        process = context.Process(target=inside, args=(case, sender, said.fileno()))
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout):
                return row | {"status": "failed", "reason": f"not done after {timeout:.0f} s"}
            return row | without_folders(receiver.recv())
        except EOFError:
            process.join()
            said.seek(0)
            words = said.read()
            print(words[-6000:], file=sys.stderr, flush=True)
            last = words.strip().splitlines()[-1:] or ["no output"]
            return row | {"status": "failed", "reason": f"exit {process.exitcode}: {last[0][:300]}"}
        finally:
            process.kill()
            process.join()


def without_folders(row: table.Row) -> table.Row:
    """The table names no folder of the machine that made it."""
    return row | {"reason": re.sub(r"/\S*/(site-packages/)?", "", row["reason"])}


def inside(case: Case, sender: Connection, output: int) -> None:
    """Measure in this process; what it prints goes to the file `output`, whose end explains a crash."""
    from architecture_run import measure

    os.dup2(output, 1)
    os.dup2(output, 2)
    sender.send(measure(case))


def summary(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    numbers = (
        f" {row['difference']:.1e} {row['gradients']:.1e} {row['compile_s']} s {row['nodes']} nodes"
        if "difference" in row
        else ""
    )
    return f"{row['status']:8} {row['name']}{numbers} {row['reason']}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
