"""Checks of an engine that run in processes of their own, within a deadline, and what they found: shared by `doctor` and `test`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finding:
    """What a stage of an engine's check said. `cure` is empty where all is well."""

    stage: str
    is_good: bool
    words: str
    cure: str = ""


def launched(
    module: str,
    flags: Sequence[str],
    stages: Mapping[str, str],
    deadline_s: float,
    *,
    cure: str,
    arguments: Sequence[str] = (),
) -> Iterator[Finding]:
    """The findings of a module that `polyaccel launch` runs; a framework that hangs or crashes takes nobody with it.

    Args:
        module: takes the path of its report as its argument, and writes a line for every stage (`polyaccel.testing.findings`).
        flags: of `polyaccel launch`.
        stages: in their order, what each does, in words that follow "did not".
        deadline_s: for all of them together.
        cure: what to do where they are not through by then.
        arguments: of the module, before the report.
    """
    command = [sys.executable, "-m", "polyaccel.cli.main", "launch", *flags, "-m", module, *arguments]
    yield from reported(command, stages, deadline_s, cure=cure, by_hand=["polyaccel", *command[3:]])


def reported(
    command: Sequence[str],
    stages: Mapping[str, str],
    deadline_s: float,
    *,
    cure: str,
    by_hand: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """The findings of a command that takes the path of its report last; `by_hand` is the same for a user's shell."""
    with tempfile.TemporaryDirectory(prefix="polyaccel-findings-") as folder:
        report = Path(folder) / "report"
        timed_out = False
        with subprocess.Popen(
            [*command, str(report)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
        ) as process:
            try:
                output, _ = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                timed_out = True
                process.terminate()
                output, _ = process.communicate()
        lines = report.read_text("utf-8").splitlines() if report.exists() else []
    # Every process says why it failed; what several of them say alike is said once.
    findings = list(dict.fromkeys(Finding(**json.loads(line)) for line in lines))
    yield from findings
    if all(finding.is_good for finding in findings) and len(findings) == len(stages) and process.returncode == 0:
        return
    if findings and not findings[-1].is_good:
        return
    reached = list(stages)[min(len(findings), len(stages) - 1)]
    if timed_out:
        yield Finding(reached, False, f"did not {stages[reached]} within {deadline_s:g} s", cure)
        return
    lines = [line for line in output.splitlines() if line.strip()]
    words = lines[-1] if lines else "no message"
    again = f"run the same with: {shlex.join([*by_hand, 'report.jsonl'])}"
    yield Finding(reached, False, f"could not {stages[reached]} (exit code {process.returncode}): {words}", again)


def show(finding: Finding) -> None:
    """A line for the finding, and one for its cure."""
    print(f"  {'ok' if finding.is_good else '!!'} {finding.stage:12} {finding.words}", flush=True)
    if finding.cure:
        print(f"     cure: {finding.cure}")
