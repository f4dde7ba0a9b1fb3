"""What the lowering tests assert: agreement with torch on calls written by hand, and on OpInfo's samples of a whole family."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from lowering_comparison import difference
from lowering_harness import Call, evaluate, record
from torch._ops import OpOverload

from polyaccel_bridges.lowerings import LOWERINGS

HERE = Path(__file__).parent


def listed(name: str, folder: Path = HERE) -> dict[str, str]:
    """The entries of a text file with their reasons: `entry: reason`, `#` begins a comment."""
    lines = (folder / name).read_text().splitlines()
    pairs = (line.split(": ", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {entry.strip(): reason.strip() for entry, reason in pairs}


def agree(*calls: Call) -> None:
    """Each call's lowering gives torch's result."""
    wrong = [f"{outcome.call}: {reason}" for outcome in evaluate(calls) if (reason := difference(outcome))]
    assert not wrong, "\n".join(wrong)


def family_of(overload: OpOverload) -> str:
    return LOWERINGS[overload].function.__module__.rsplit(".", 1)[-1]


def overloads_of_all() -> list[OpOverload]:
    """Every operation that has a lowering."""
    return list(LOWERINGS)


def overloads_of(*families: str) -> list[OpOverload]:
    """Random operations are left out: torch draws other numbers."""
    return [
        overload for overload, entry in LOWERINGS.items() if family_of(overload) in families and not entry.is_random
    ]


@functools.cache
def samples_of(families: tuple[str, ...]) -> tuple[Call, ...]:
    """Recorded once for all families of a test file: running the samples takes as long for one as for many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return tuple(record(overloads_of(*families)))
    finally:
        torch.set_num_threads(threads)


def family_agrees(family: str, recorded_with: tuple[str, ...]) -> None:
    """Every recorded call of the family agrees, but for the known differences; a known difference that is gone must be struck out.

    A lowering that no sample reaches must be named in a test of this folder.
    """
    calls = [call for call in samples_of(recorded_with) if family_of(call.overload) == family]
    reached = {call.overload for call in calls}
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    unchecked = [str(name) for name in overloads_of(family) if name not in reached and str(name) not in tests]
    assert not unchecked, f"neither a sample nor a test reaches {unchecked}"
    known = listed("known_differences.txt")
    wrong, met = [], set()
    for outcome in evaluate(calls):
        reason = difference(outcome)
        entry = _entry(outcome.call)
        if reason and entry in known:
            met.add(entry)
        elif reason:
            wrong.append(f"{outcome.call}: {reason}")
    recorded = {_entry(call) for call in calls}
    gone = [entry for entry in known if entry in recorded and entry not in met]
    assert not wrong, "\n".join(wrong)
    assert not gone, f"known_differences.txt: these agree now: {gone}"


def _entry(call: Call) -> str:
    """`aten.name.overload dtype`, the dtype of its first tensor."""
    first = next((arg for arg in call.args if isinstance(arg, torch.Tensor)), None)
    return str(call.overload) if first is None else f"{call.overload} {str(first.dtype).removeprefix('torch.')}"
