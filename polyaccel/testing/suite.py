"""Runs the conformance suite on one backend with pytest, and reports: what `polyaccel test --conformance` starts.

python -m polyaccel.testing.suite [--device] BACKEND [DIALECT] REPORT

It computes on the CPU; with --device on the accelerator that the engine finds, with products of float32 in float32.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from polyaccel.registry import load_backend
from polyaccel.testing import suite
from polyaccel.testing.cases import case_for
from polyaccel.testing.conformance import Conformance
from polyaccel.testing.findings import writer

STAGE = "conformance"


class Outcomes:
    """A pytest plugin that keeps what became of every test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.skipped: list[str] = []
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for set-up, call and tear-down of each test."""
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
            self.failed[name] = errors[0] if errors else lines[-1] if lines else "no message"
        elif report.skipped:
            self.skipped.append(name)
        elif report.when == "call":
            self.passed.append(name)


def main() -> int:
    """Run the suite; the exit code says whether every test passed."""
    on_device = sys.argv[1] == "--device"
    backend, *dialect, path = sys.argv[2 if on_device else 1 :]
    report = writer(path)
    if on_device:
        load_backend(backend).multiply_exactly()

    class TestHere(Conformance):
        case = case_for(backend, *dialect)
        cpu = not on_device

    # pytest finds tests in modules: this one, by the name that it imports it under.
    suite.TestHere = TestHere  # type: ignore[attr-defined]
    outcomes = Outcomes()
    options = ["-c", os.devnull, "--rootdir", os.path.dirname(__file__), "-p", "no:cacheprovider", "-q", "--tb=short"]
    code = int(pytest.main([*options, f"{__file__}::TestHere"], plugins=[outcomes]))
    for name, words in outcomes.failed.items():
        report({"stage": STAGE, "is_good": False, "words": f"{name}: {words}"})
    if outcomes.failed:
        return 1
    if code != 0 or not outcomes.passed:
        report(
            {
                "stage": STAGE,
                "is_good": False,
                "words": f"pytest ended with exit code {code} and {len(outcomes.passed)} tests",
            }
        )
        return 1
    skipped = f", {len(outcomes.skipped)} do not apply" if outcomes.skipped else ""
    where = "on the device" if on_device else "on the CPU"
    report({"stage": STAGE, "is_good": True, "words": f"{len(outcomes.passed)} tests pass {where}{skipped}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
