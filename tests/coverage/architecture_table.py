"""The measured table of architectures: one JSON line per case, merged run by run, and the page that is generated from it."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("architectures.json")
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

Row = dict[str, Any]


def read(path: Path = TABLE) -> dict[str, Row]:
    """The rows by name."""
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}


def merge(rows: list[Row], known: set[str], path: Path = TABLE) -> None:
    """Put `rows` in place of those of the same name, and drop those whose name is not `known`; several runs may write at once."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        table = {name: row for name, row in read(path).items() if name in known} | {row["name"]: row for row in rows}
        ordered = sorted(table.values(), key=lambda row: (row["family"], row["name"].lower()))
        lines = ",\n".join(json.dumps(row, sort_keys=True) for row in ordered)
        written = path.with_suffix(".tmp")
        written.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        written.replace(path)
    finally:
        os.close(folder)


def page(rows: dict[str, Row]) -> str:
    """docs/architectures.md."""
    counts = Counter(row["status"] for row in rows.values())
    counted = ", ".join(
        f"{counts[status]} {status}" for status in ("passed", "ill-conditioned", "refused", "failed") if counts[status]
    )
    versions = sorted({f"{name} {number}" for row in rows.values() for name, number in row["versions"].items()})
    lines = [
        "# Architectures",
        "",
        "Tiny models with random weights, built by the libraries that users take them from, each trained for 20 AdamW steps by",
        '`Accelerator(backend="jax")` and by `Accelerator(backend="torch")` on equal weights and batches (float32, CPU, dropout off).',
        "",
        "- *losses*: the largest relative difference of the 20 losses. *gradients*: of the gradients of the first step, the largest",
        "  difference relative to the largest value of the same gradient. Below 1e-4 and 1e-3 the case has passed.",
        "- *ill-conditioned*: rounding alone tells the two curves apart, which the same runs in float64 show.",
        "- *seconds*: CPU time of capturing and compiling; a star: compiled without XLA's expensive passes.",
        "- *nodes*: operations of the captured programs (forward, loss and backward).",
        "",
        f"{len(rows)} architectures: {counted}. Measured with {', '.join(versions)}.",
        "",
        "Generated from `tests/coverage/architectures.json` by `python tests/coverage/architectures.py --write`.",
    ]
    for family in sorted({row["family"] for row in rows.values()}):
        lines += ["", f"## {family.capitalize()}", ""]
        lines += [
            "| architecture | params | losses | gradients | seconds | nodes | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_line(row) for row in rows.values() if row["family"] == family]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    numbers = "- | - | - | -"
    if "difference" in row:
        gradients = f"{row['gradients']:.1e}" if "gradients" in row else "-"
        seconds = f"{row['compile_s']}{'*' if row.get('quick') else ''}"
        numbers = f"{row['difference']:.1e} | {gradients} | {seconds} | {row['nodes']}"
    status = "" if row["status"] == "passed" else f"**{row['status']}**"
    words = "; ".join(part for part in (status, _plain(row["reason"]), row["note"]) if part)
    return f"| {row['name']} | {row['params']:,} | {numbers} | {words} |"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
