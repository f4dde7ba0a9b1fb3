"""operations.json, one line per operation and version of torch, and the page that is generated from it."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any

import torch
from operations_check import Row

JSON = Path(__file__).parent / "operations.json"
REACHED = Path(__file__).parent / "operations_reached.json"
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def version_of_torch() -> str:
    """Major and minor number: what a row is kept under."""
    return ".".join(torch.__version__.split(".")[:2])


def name_of(operation: Any) -> str:
    """The name of an OpInfo entry, with its variant."""
    return f"{operation.name} ({operation.variant_test_name})" if operation.variant_test_name else operation.name


def plain(row: Row) -> dict[str, Any]:
    """A row as it is kept: what is zero or empty is left out, errors are rounded up to one digit."""
    kept: dict[str, Any] = {"agree": row.agree}
    if row.is_random:
        kept["shapes_only"] = True
    else:
        kept["forward"] = rounded(row.forward)
        if row.backward is not None:
            kept["backward"] = rounded(row.backward)
    if row.by_float64:
        kept["by_float64"] = row.by_float64
    if row.refused:
        kept["refused"] = dict(sorted(row.refused.items()))
    if row.differ:
        kept["differ"] = row.differ
    return kept


def rounded(error: float) -> str:
    """One digit, rounded up: another machine's last digits change no line."""
    if error == 0.0 or not math.isfinite(error):
        return "0" if error == 0.0 else "inf"
    power = math.floor(math.log10(error))
    digit = math.ceil(error / 10**power - 1e-9)
    return f"1e{power + 1:+03d}" if digit == 10 else f"{digit}e{power:+03d}"


def summary(rows: dict[str, Any]) -> str:
    """One line for the terminal."""
    return "; ".join(
        f"{dtype} {row['agree']}"
        + (f" refused {sum(row['refused'].values())}" if "refused" in row else "")
        + (f" DIFFER {len(row['differ'])}" if "differ" in row else "")
        for dtype, row in rows.items()
    )


def read() -> dict[str, dict[str, Any]]:
    """Rows by operation, then version of torch, then dtype."""
    return json.loads(JSON.read_text()) if JSON.exists() else {}


def read_reached() -> dict[str, dict[str, list[str]]]:
    """By operation and version: the ATen operations that its captured graphs contain."""
    return json.loads(REACHED.read_text()) if REACHED.exists() else {}


def merge(name: str, version: str, rows: dict[str, Any], reached: list[str]) -> None:
    """Put the rows of one operation where its older ones were."""
    with JSON.with_suffix(".lock").open("w") as lock:  # sweeps of two versions may run at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path, entry in ((JSON, rows), (REACHED, reached)):
            table = json.loads(path.read_text()) if path.exists() else {}
            table.setdefault(name, {})[version] = entry
            _write(path, table)


def _write(path: Path, table: dict[str, dict[str, Any]]) -> None:
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(version)}: {json.dumps(entry)}" for version, entry in sorted(versions.items()))
        + "\n }"
        for name, versions in sorted(table.items(), key=lambda item: (item[0].lower(), item[0]))
    ]
    beside = path.with_suffix(".new")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    beside.replace(path)


def write_page() -> None:
    """Generate docs/operations.md."""
    from operations_page import page

    PAGE.write_text(page(read(), read_reached()))
