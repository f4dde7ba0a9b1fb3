"""A run as one HTML page that needs nothing else: curves, configuration, machine, events. For a colleague, or for the archive."""

from __future__ import annotations

import html
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polyaccel.errors import TrackerError
from polyaccel.tracking import speed
from polyaccel.tracking.charts import Series, svg
from polyaccel.tracking.runs import Run
from polyaccel.tracking.values import flatten

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1360px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .lead { color: gray; margin-top: .2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 1rem; }
svg { width: 100%; border: 1px solid var(--line); border-radius: 6px; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .title { font-size: 13px; font-weight: 600; } svg .grid { stroke: var(--line); }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid var(--soft); } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
"""
_LATEST_EVENTS = 200


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A whole document of sections that are HTML already."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections.items() if content)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{body}</body></html>\n'
    )


def table(rows: Iterable[Iterable[Any]], head: Iterable[str] = ()) -> str:
    """An HTML table; an empty text for no rows."""
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>" if lines else ""


def write_page(file: Path, text: str) -> Path:
    """Write a page; returns its path. Raises TrackerError where that is impossible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise TrackerError(f"{file} cannot be written: {error.strerror}", "name another file with -o") from error
    return file


def summary(run: Run) -> dict[str, str]:
    """What is worth a line of its own: throughput, compilations, checkpoints, the error. Only what the run has."""
    lines = {}
    noted = speed.in_words(run)
    series = run.throughput()
    if noted is not None:
        lines["throughput"] = noted
    elif series:
        rates = sorted(rate for _, rate in series)
        lines["throughput"] = f"{rates[len(rates) // 2]:.4g} steps/s (median)"
    compiled = list(run.events("compile"))
    if compiled:
        seconds = sum(event["capture_s"] + event["compile_s"] for event in compiled)
        lines["compiled"] = f"{_count(len(compiled), 'program')} in {seconds:.1f} s"
    saved = list(run.events("checkpoint"))
    if saved:
        lines["checkpoints"] = str(len(saved))
    if run.facts.get("error"):
        lines["error"] = str(run.facts["error"])
    return lines


def report(run: Run) -> str:
    """The page of a run."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
    events = list(run.events())
    series = {name: run.series(name) for name in run.names()}
    charts = "".join(svg({name: line}, name) for name, line in series.items() if len(line) > 1)
    latest = ([name, *_extremes(line)] for name, line in series.items())
    return page(
        f"{run.project} / {run.id}",
        f"{run.status}, started {started}, {duration(run.duration_s)}",
        {
            "Summary": table(summary(run).items()),
            "Metrics": f'<div class="charts">{charts}</div>' if charts else "<p>No metric has two values.</p>",
            "Values": table(latest, ("metric", "last", "at step", "least", "greatest")),
            "Throughput": _throughput(run),
            "Compilations": table(
                (
                    [e["step"], e["program"], e["cause"], f"{e['capture_s']:.2f}", f"{e['compile_s']:.2f}"]
                    for e in events
                    if e["event"] == "compile"
                ),
                ("step", "program", "cause", "capture (s)", "compile (s)"),
            ),
            "Checkpoints": table(
                ([_clock(e["time"]), _rest(e)] for e in events if e["event"] == "checkpoint"), ("time", "")
            ),
            "Configuration": table(sorted(flatten(run.config, ".").items())),
            "Run": table(_facts(run)),
            "Events": table(
                ([_clock(event["time"]), event["event"], _rest(event)] for event in events[-_LATEST_EVENTS:]),
                ("time", "event", ""),
            ),
        },
    )


def _throughput(run: Run) -> str:
    """What progress bars noted, by the second; for a run without bars the steps of its log calls."""
    noted = {
        "samples per second": speed.over_time(run, "samples_per_s"),
        "steps per second": speed.over_time(run, "steps_per_s"),
        "share of the time that waited for data": speed.over_time(run, "data_share"),
        "memory (MiB)": [(at, used / 2**20) for at, used in speed.over_time(run, "memory_bytes")],
        "MFU": speed.over_time(run, "mfu"),
    }
    loops = table(map(speed.row, speed.loops(run)), speed.HEAD)
    if not loops:
        noted = {"steps per second": [(float(step), rate) for step, rate in run.throughput()]}
    charts = "".join(
        svg({"": line}, f"{title}{'' if not loops else ', by seconds'}")
        for title, line in noted.items()
        if len(line) > 1
    )
    return (f'<div class="charts">{charts}</div>' if charts else "") + loops


def duration(seconds: float) -> str:
    """Seconds for people: 3 h 12 min, 4 min 3 s, 0.4 s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    for name, value in sorted(flatten(run.facts, ".").items()):
        if name.partition(".")[0] in ("config", "version", "id", "project"):
            continue
        if name in ("created", "started", "ended") and value is not None:
            value = _clock(value)
        elif name == "resumed":
            value = ", ".join(map(_clock, value))
        elif name == "command":
            value = shlex.join(value)
        yield name, "-" if value in (None, {}, []) else str(value)


def _extremes(line: Series) -> list[str]:
    step, last = line[-1]
    finite = [value for _, value in line if math.isfinite(value)]
    ends = [f"{min(finite):.6g}", f"{max(finite):.6g}"] if finite else ["-", "-"]
    return [f"{last:.6g}", f"{step:g}", *ends]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _rest(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("time", "event"))
