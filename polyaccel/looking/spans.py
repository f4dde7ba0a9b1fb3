"""What a trace says in sum: every kind of span with its calls and times, under the names that torch.profiler gives such tables."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyaccel.errors import ConfigError

_WIDEST_NAME = 55


@dataclass(frozen=True, slots=True)
class SpanAverage:
    """All spans of one name on the host, or on the devices: `total_us` with what ran inside them, `self_us` without."""

    key: str
    is_on_device: bool
    count: int
    total_us: float
    self_us: float


class SpanAverages(list[SpanAverage]):
    """The spans of a trace by name; what `profile.key_averages()` gives where the engine's own profiler has no such table."""

    def table(self, sort_by: str | None = None, row_limit: int = 100, **other: Any) -> str:
        """As text, at most `row_limit` rows. `sort_by` is "count", or of host or device a time: "self_cpu_time_total",
        "cpu_time_total", "self_cuda_time_total", ... Raises ConfigError for what these traces have no numbers of.
        """
        if other:
            raise ConfigError(f"table has no {', '.join(sorted(other))} here", "it takes sort_by and row_limit")
        rows = sorted(self, key=lambda row: _rank(row, sort_by), reverse=True) if sort_by is not None else self
        lines = [f"{'name':<{_WIDEST_NAME}}  {'where':<6}  {'self':>12}  {'total':>12}  {'per call':>12}  {'calls':>7}"]
        for row in rows[:row_limit]:
            times = "  ".join(f"{value:>9.1f} us" for value in (row.self_us, row.total_us, row.total_us / row.count))
            where = "device" if row.is_on_device else "host"
            lines.append(f"{row.key[:_WIDEST_NAME]:<{_WIDEST_NAME}}  {where:<6}  {times}  {row.count:>7}")
        return "\n".join(lines)


def averages_of(trace: Path) -> SpanAverages:
    """The sums of a trace in Chrome's JSON, which may be packed with gzip."""
    data = trace.read_bytes()
    events = json.loads(gzip.decompress(data) if trace.suffix == ".gz" else data)["traceEvents"]
    places = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    lanes: dict[tuple[Any, Any], list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            lanes[event["pid"], event.get("tid")].append((event["ts"], -event.get("dur", 0.0), event["name"]))
    sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for (pid, _), spans in lanes.items():
        is_on_device = "/device:" in places.get(pid, "")
        for name, total, own in _with_own_time(sorted(spans)):
            row = sums[name, is_on_device]
            row[:] = row[0] + 1, row[1] + total, row[2] + own
    found = (SpanAverage(name, place, int(n), total, own) for (name, place), (n, total, own) in sums.items())
    return SpanAverages(sorted(found, key=lambda row: row.self_us, reverse=True))


def _with_own_time(spans: Sequence[tuple[float, float, str]]) -> Iterable[tuple[str, float, float]]:
    """(name, duration, duration without what is nested in it) of one thread's (start, -duration, name), in order of their starts."""
    inside = [0.0] * len(spans)
    open_spans: list[tuple[float, int]] = []  # (end, position)
    for position, (start, negative, _) in enumerate(spans):
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            inside[open_spans[-1][1]] -= negative
        open_spans.append((start - negative, position))
    for (_, negative, name), nested in zip(spans, inside, strict=True):
        yield name, -negative, max(-negative - nested, 0.0)


def _rank(row: SpanAverage, sort_by: str) -> float:
    if sort_by == "count":
        return row.count
    if not sort_by.endswith(("_time", "_time_total")):
        raise ConfigError(
            f"sort_by={sort_by!r}: these traces have calls and times alone", 'use "self_cpu_time_total" or "count"'
        )
    if row.is_on_device == ("cpu_" in sort_by):  # of the other place: after all of this one
        return -1.0
    value = row.self_us if sort_by.startswith("self_") else row.total_us
    return value if sort_by.endswith("_total") else value / row.count
