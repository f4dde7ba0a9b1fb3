"""A run as one HTML page that needs nothing else: curves, configuration, machine, events. For a colleague, or for the archive."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping
from typing import Any

from polyaccel.tracking.charts import svg
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


def report(run: Run) -> str:
    """The page of a run."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
    facts = {name: value for name, value in run.facts.items() if name not in ("config", "version", "id", "project")}
    events = list(run.events())
    charts = "".join(svg({name: run.series(name)}, name) for name in run.names())
    return page(
        f"{run.project} / {run.id}",
        f"{run.status}, started {started}, {_duration(run.duration_s)}",
        {
            "Metrics": f'<div class="charts">{charts}</div>' if charts else "<p>No numbers were logged.</p>",
            "Configuration": table(sorted(flatten(run.config, ".").items())),
            "Run": table(sorted(flatten(facts, ".").items())),
            "Events": table(
                ([_clock(event["time"]), event["event"], _rest(event)] for event in events[-_LATEST_EVENTS:]),
                ("time", "event", ""),
            ),
        },
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _rest(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("time", "event"))
