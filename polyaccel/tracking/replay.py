"""Sends a run folder to a tracker afterwards: what an outage kept back, or a tracker that was not there at the time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyaccel.errors import TrackerError
from polyaccel.tracking.names import package_of, tracker_class
from polyaccel.tracking.runs import Run
from polyaccel.tracking.tracker import CannotTake, RunInfo
from polyaccel.tracking.values import from_json

log = logging.getLogger("polyaccel.tracking")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What `replay` sent, and what the tracker has no place for."""

    num_metrics: int
    num_images: int
    num_tables: int
    num_artifacts: int
    num_left_out: int


def replay(run: Run | str | Path, to: str, **options: Any) -> Replayed:
    """Send everything in a run folder to the tracker `to`, in order, on the calling thread; it waits for the tracker.

    `options` are the tracker's own (those of init_kwargs). The vendor's run gets the id and name of the run, where the vendor lets it;
    replaying twice makes a vendor that appends hold everything twice. Objects of a vendor's own (wandb.Image) are not in the
    folder and are left out. Raises TrackerError for an unknown tracker or a missing package, and whatever the tracker raises.
    """
    source = run if isinstance(run, Run) else Run.load(run)
    kind = tracker_class(to)
    missing = package_of(kind)
    if missing is not None:
        raise TrackerError(
            f"tracker {to!r} needs the package {missing}", f"pip install {getattr(kind, 'requirement', missing)}"
        )
    positional = (source.project, str(source.folder)) if kind.requires_logging_directory else (source.project,)
    tracker = kind(*positional, **options)
    tracker.run = RunInfo(source.id, source.project, source.folder, source.config)
    tracker.start()
    try:
        if source.config:
            tracker.store_init_configuration(source.config)
        return _send(source, tracker, to)
    finally:
        tracker.finish()


def _send(source: Run, tracker: Any, to: str) -> Replayed:
    counts = {"metrics": 0, "image": 0, "table": 0, "artifact": 0, "left out": 0}
    for kind, line in in_order(source):
        if line.get("only") not in (None, to):
            continue
        try:
            sent = _send_metrics(tracker, line) if kind == "metrics" else _send_thing(source, tracker, kind, line)
        except CannotTake:
            sent = False
        counts[kind if sent else "left out"] += 1
    return Replayed(counts["metrics"], counts["image"], counts["table"], counts["artifact"], counts["left out"])


def in_order(source: Run) -> list[tuple[str, dict[str, Any]]]:
    """Everything of a run that a tracker can be sent, by time: ("metrics", "image", "table" or "artifact", its line)."""
    lines: list[tuple[str, dict[str, Any]]] = [
        ("metrics", {"time": entry.time, "step": entry.step, "values": entry.values, "only": entry.only})
        for entry in source.metrics()
    ]
    lines += [(line["event"], line) for line in source.events() if line["event"] in ("image", "table", "artifact")]
    return sorted(lines, key=lambda line: float(line[1]["time"]))


def _send_metrics(tracker: Any, line: Mapping[str, Any]) -> bool:
    values = {name: value for name, value in line["values"].items() if not name.endswith("/object")}
    if values:
        tracker.log(values, step=line["step"])
    return bool(values)


def _send_thing(source: Run, tracker: Any, kind: str, line: Mapping[str, Any]) -> bool:
    file = source.folder / line["file"] if "file" in line else Path(line.get("path", ""))
    if "object" in line or not file.exists():
        return False
    if kind == "image":
        tracker.log_images({line["name"]: [str(file)]}, step=line["step"])
    elif kind == "table":
        table = json.loads(file.read_text("utf-8"))
        rows = [[from_json(cell) for cell in row] for row in table["rows"]]
        tracker.log_table(line["name"], columns=table["columns"], data=rows, step=line["step"])
    else:
        tracker.log_artifact(str(file), name=line["name"])
    return True
