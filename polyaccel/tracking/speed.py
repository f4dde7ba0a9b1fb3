"""How fast a run was, as its progress bars noted it: `accelerator.progress` writes an event every ten seconds and at its end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polyaccel.looking.bars import clock, memory, short
from polyaccel.tracking.runs import Run

HEAD = ("loop", "steps", "time", "steps/s", "samples/s", "waiting for data", "memory", "FLOP/s", "MFU")


def loops(run: Run) -> list[dict[str, Any]]:
    """Every loop with a progress bar that came to its end, in order: one per epoch, usually."""
    return [event for event in run.events("progress") if event["is_over"]]


def over_time(run: Run, name: str) -> list[tuple[float, float]]:
    """(seconds since the run began, number) of what the main loop noted, such as "samples_per_s"; an epoch without a note counts once."""
    found = []
    last: dict[str, Any] = {}
    main = _main_key(loops(run))
    for event in run.events("progress"):
        if _key(event) != main:
            continue
        has_notes = last.get("description") == event["description"] and not last["is_over"]
        if event[name] is not None and not (event["is_over"] and has_notes):
            found.append((event["time"] - run.created, float(event[name])))
        last = event
    return found


def main_loop(run: Run) -> dict[str, Any] | None:
    """The numbers of the loop that took most steps, its epochs together (names that differ by digits are one); None without bars."""
    events = loops(run)
    main = _main_key(events)
    events = [event for event in events if _key(event) == main]
    if not events:
        return None
    memories = [event["memory_bytes"] for event in events if event["memory_bytes"] is not None]
    return {
        **{name: _mean(events, name) for name in ("steps_per_s", "samples_per_s", "data_share", "flops_per_s", "mfu")},
        "memory_bytes": max(memories, default=None),
    }


def _key(event: Mapping[str, Any]) -> str:
    return re.sub(r"\d+", "#", event["description"])


def _main_key(events: Sequence[Mapping[str, Any]]) -> str | None:
    steps: Counter[str] = Counter()
    for event in events:
        steps[_key(event)] += event["num_steps"]
    return max(steps, key=lambda key: steps[key], default=None)


def _mean(events: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of rates over time."""
    known = [(event[name], event["measured_s"]) for event in events if event[name] is not None]
    seconds = sum(time for _, time in known)
    return sum(rate * time for rate, time in known) / seconds if seconds else None


def row(event: Mapping[str, Any]) -> list[str]:
    """A loop as a row under HEAD."""
    return [event["description"] or "-", str(event["num_steps"]), clock(event["seconds"]), *_cells(event)]


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    forms = {
        "steps_per_s": short,
        "samples_per_s": short,
        "data_share": "{:.0%}".format,
        "memory_bytes": lambda used: memory(used, None),
        "flops_per_s": short,
        "mfu": "{:.1%}".format,
    }
    return ["-" if numbers[name] is None else form(numbers[name]) for name, form in forms.items()]


def in_words(run: Run) -> str | None:
    """ "19.8 steps/s, 158 samples/s, waiting for data 3%, 401 MiB, 4.2TFLOP/s, MFU 41%"; None for a run without bars."""
    numbers = main_loop(run)
    if numbers is None or numbers["steps_per_s"] is None:
        return None
    forms = ("{} steps/s", "{} samples/s", "waiting for data {}", "{}", "{}FLOP/s", "MFU {}")
    return ", ".join(form.format(cell) for form, cell in zip(forms, _cells(numbers), strict=True) if cell != "-")
