"""Runs PyTorch's database of operations through capture and replay: `scripts/coverage operations [--only REGEX] [--missing]`.

Rows are merged into operations.json as they come, under the version of torch that ran; at the end docs/operations.md is generated
from the rows of all versions. The exit status is 1 where a result differs from torch's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu")

import operations_table as table
import torch
from operations_check import SAMPLES, check


def main() -> int:
    """Sweep what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="operations whose whole name matches")
    parser.add_argument("--missing", action="store_true", help="operations that have no row of this torch yet")
    parser.add_argument("--differing", action="store_true", help="operations with a result that differs from torch's")
    parser.add_argument("--refused", action="store_true", help="operations of which something was refused")
    parser.add_argument("--quick", action="store_true", help="three samples in float32 and one in every other dtype")
    parser.add_argument("--write", action="store_true", help="run nothing; generate docs/operations.md")
    asked = parser.parse_args()
    differing = 0 if asked.write else sweep(asked)
    table.write_page()
    return 1 if differing else 0


def sweep(asked: argparse.Namespace) -> int:
    """Run the chosen operations; how many differ."""
    from torch.testing._internal.common_methods_invocations import op_db

    torch.set_num_threads(1)
    version = table.version_of_torch()
    before = table.read()
    operations = [operation for operation in op_db if _is_chosen(operation, asked, before, version)]
    differing = 0
    for number, operation in enumerate(operations, start=1):
        name = table.name_of(operation)
        start = time.monotonic()
        reached: Counter[str] = Counter()
        rows: dict[str, Any] = {}
        for dtype in SAMPLES:
            if operation.supports_dtype(dtype, "cpu"):
                count = None if not asked.quick else 3 if dtype is torch.float32 else 1
                row = check(operation, dtype, reached, count)
                if row is not None:
                    rows[str(dtype).removeprefix("torch.")] = table.plain(row)
                    for reason in row.differ:
                        print(f"  {name} {dtype}: {reason}", flush=True)
        differing += any("differ" in row for row in rows.values())
        table.merge(name, version, rows, sorted(reached))
        print(f"[{number}/{len(operations)}] {name} {time.monotonic() - start:.1f} s {table.summary(rows)}", flush=True)
    return differing


def _is_chosen(operation: Any, asked: argparse.Namespace, before: dict[str, Any], version: str) -> bool:
    name = table.name_of(operation)
    rows = before.get(name, {}).get(version)
    if asked.missing and rows is not None:
        return False
    if asked.differing and not any("differ" in row for row in (rows or {}).values()):
        return False
    if asked.refused and not any("refused" in row for row in (rows or {}).values()):
        return False
    return re.fullmatch(asked.only or ".*", name) is not None


if __name__ == "__main__":
    sys.exit(main())
