"""Reading run folders: which runs there are, how they stand, their metrics and events. Reads what a live run has written so far."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from polyaccel.errors import TrackerError, nearest
from polyaccel.tracking.record import VERSION
from polyaccel.tracking.surroundings import is_alive
from polyaccel.tracking.values import flatten, from_json

STALE_S = 60.0  # a run of another host whose heartbeat is older has ended without saying so

Status = Literal["running", "finished", "preempted", "crashed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One `log`: nested names are joined by "/", NaN and infinities are floats again."""

    time: float
    step: int | None
    values: dict[str, Any]
    only: str | None = None  # it was logged to this one tracker


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder. `facts` is its run.json."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """The run in that folder. Raises TrackerError where there is none, or one that this version cannot read."""
        folder = Path(folder)
        file = folder / "run.json"
        try:
            facts = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise TrackerError(
                f"{str(folder)!r} is no run folder: it has no run.json", "see `polyaccel runs list`"
            ) from None
        except (OSError, ValueError) as error:
            raise TrackerError(f"{file} cannot be read: {error}", "restore it, or delete the folder") from error
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            raise TrackerError(f"{file} is not of version {VERSION}", "read it with the polyaccel that wrote it")
        return cls(folder, facts)

    @property
    def id(self) -> str:
        """The run id: the name of its folder."""
        return str(self.facts["id"])

    @property
    def project(self) -> str:
        """The project, as the script named it."""
        return str(self.facts["project"])

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, nested as it was given; secrets read "[redacted]"."""
        return dict(self.facts["config"])

    @property
    def created(self) -> float:
        """When the run first started, in seconds since 1970."""
        return float(self.facts["created"])

    @property
    def status(self) -> Status:
        """ "running", "finished", "preempted" (saved to be continued), or "crashed": it ended by an exception, or its process is gone
        without having said anything.

        On the host of the run its process is looked up, elsewhere the heartbeat decides.
        """
        said: Status = self.facts["status"]
        if said != "running":
            return said
        if self.facts["host"] == socket.gethostname():
            return "running" if is_alive(self.facts["pid"], self.facts["process_started"]) else "crashed"
        return "running" if time.time() - self.last_sign < STALE_S else "crashed"

    @property
    def last_sign(self) -> float:
        """When the run last gave a sign of life."""
        try:
            return (self.folder / "heartbeat").stat().st_mtime
        except OSError:
            return float(self.facts["started"])

    @property
    def duration_s(self) -> float:
        """Seconds from its (last) start to its end or last sign of life."""
        ended: float | None = self.facts["ended"]
        return (self.last_sign if ended is None else ended) - float(self.facts["started"])

    def metrics(self, process_index: int = 0) -> Iterator[Entry]:
        """Every `log` in the order of the calls; a resumed run may have a step twice."""
        suffix = "" if process_index == 0 else f"-{process_index}"
        for line in _lines(self.folder / f"metrics{suffix}.jsonl"):
            values = {name: from_json(value) for name, value in flatten(line["values"], "/").items()}
            yield Entry(line["time"], line["step"], values, line.get("only"))

    def names(self) -> list[str]:
        """Names of the numbers that were logged, in order of appearance."""
        return list(
            {name: None for entry in self.metrics() for name, value in entry.values.items() if _is_number(value)}
        )

    def throughput(self) -> list[tuple[int, float]]:
        """(step, steps per second) of at most 60 stretches of equal time; empty for a run that logged no two steps.

        Log calls do not wait for the device, so that the time between two of them says little and that of a stretch a lot. What a
        script does between two steps (evaluation, saving) counts.
        """
        moments = [(entry.time, entry.step) for entry in self.metrics() if entry.step is not None]
        if not moments:
            return []
        stretch_s = max((moments[-1][0] - moments[0][0]) / 60, 0.25)
        found: list[tuple[int, float]] = []
        since, first = moments[0]
        for at, step in moments:
            if step < first:  # a resumed run goes back
                since, first = at, step
            elif at - since >= stretch_s and step > first:
                found.append((step, (step - first) / (at - since)))
                since, first = at, step
        return found

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, number) in order of steps. Of a step logged twice (a resumed run) the later number counts; what was logged without a
        step counts on from the last one. Raises TrackerError for a name that was never logged."""
        found: dict[int, float] = {}
        following = 0
        for entry in self.metrics():
            value = entry.values.get(name)
            if _is_number(value):
                step = following if entry.step is None else entry.step
                found[step] = float(value)
                following = step + 1
        if not found:
            raise TrackerError(f"run {self.id!r} has no metric {name!r}", nearest(name, self.names()))
        return sorted(found.items())

    def events(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """Events in order (each has "time" and "event"): all, or those of one kind."""
        for line in _lines(self.folder / "events.jsonl"):
            if event in (None, line["event"]):
                yield line


def list_runs(folder: str | Path = "runs", project: str | None = None) -> list[Run]:
    """The runs below a folder, of all projects or of one, newest first. A folder that does not exist has none."""
    found = []
    for file in Path(folder).glob("*/*/run.json"):
        try:
            run = Run.load(file.parent)
        except TrackerError:
            continue  # half written by a dying process, or of another version; `Run.load` of it says which
        if project in (None, run.project):
            found.append(run)
    return sorted(found, key=lambda run: run.created, reverse=True)


def find_run(name: str, folder: str | Path = "runs") -> Run:
    """The run of that folder, or the one below `folder` whose id is, or alone starts with, `name`. Raises TrackerError."""
    if Path(name, "run.json").is_file():
        return Run.load(name)
    runs = list_runs(folder)
    exact = [run for run in runs if run.id == name]
    matching = exact or [run for run in runs if run.id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise TrackerError(f"{name!r} could be any of {', '.join(run.id for run in matching)}", "write more of the id")
    raise TrackerError(f"no run {name!r} below {str(folder)!r}", nearest(name, [run.id for run in runs]))


def leading_metric(names: Sequence[str]) -> str | None:
    """The metric that a list shows of a run: the first whose name speaks of a loss, else the first one; None for no names."""
    return next((name for name in names if "loss" in name.lower()), names[0] if names else None)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; a line that a killed process left unfinished is passed over."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
