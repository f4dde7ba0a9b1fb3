"""The thread that turns what was logged into lines of the run folder, and passes it on to the trackers' own threads.

    <runs>/<project>/<run id>/
        run.json          id, project, status, config, command, host, versions, commit, engine, trackers; replaced as a whole
        metrics.jsonl     {"time", "step", "values"}: one line per `log`
        events.jsonl      {"time", "event", ...}: start, resume, image, table, artifact, checkpoint, compile,
                          progress, profile, end
        images/ tables/ artifacts/
        heartbeat         touched every few seconds while the process lives
        metrics-<n>.jsonl of process n, only where a tracker wants every process

A line reaches the operating system at most FLUSH_S after `log` returned, and outlives the process from then on (kill -9 included); the
disk itself is asked to keep it at the end of the run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from polyaccel.redaction import Redaction
from polyaccel.tracking import artifacts
from polyaccel.tracking.files import Lines, encode
from polyaccel.tracking.png import to_png
from polyaccel.tracking.tracker import GeneralTracker
from polyaccel.tracking.values import flatten, settle
from polyaccel.tracking.worker import Worker

FLUSH_S = 0.1
HEARTBEAT_S = 5.0
RETRY_S = 1.0
MAX_WAITING = 100_000  # records between the training thread and this one

log = logging.getLogger("polyaccel.tracking")


class Metrics(
    NamedTuple
):  # made on the training thread for every `log`, where a frozen dataclass costs a microsecond more
    """One `log`: `values` are snapshots, some still on their way from a device; `only` names the one tracker that it is for."""

    time: float
    step: int | None
    values: Mapping[str, Any]
    options: Mapping[str, Any]
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Images:
    """One `log_images`."""

    time: float
    step: int | None
    values: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One `log_table`."""

    time: float
    step: int | None
    name: str
    columns: list[str]
    rows: list[list[Any]]
    options: Mapping[str, Any]
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """One `log_artifact`: a path, or an object of a vendor's own."""

    time: float
    artifact: Any
    name: str | None
    options: Mapping[str, Any]
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A fact about the run."""

    time: float
    event: str
    facts: Mapping[str, Any]


class RunWriter(threading.Thread):
    """Owns the files of one process in a run folder. `post` costs the training thread an append to a queue."""

    def __init__(
        self,
        folder: Path,
        redaction: Redaction,
        workers: Sequence[Worker],
        *,
        process_index: int = 0,
        at_start: Callable[[], None],
        compile_events: Callable[[], Sequence[Any]] = tuple,
    ) -> None:
        super().__init__(name="polyaccel-run-writer", daemon=True)
        self.folder = folder
        self.workers = {worker.tracker_name: worker for worker in workers}
        self.num_dropped = 0
        self.latest: Mapping[str, tuple[int, float]] = {}  # by name (number of the log call, the number logged last)
        self._num_logs = 0
        suffix = "" if process_index == 0 else f"-{process_index}"
        self._metrics = Lines(folder / f"metrics{suffix}.jsonl")
        self._events = Lines(folder / f"events{suffix}.jsonl")
        self._heartbeat = folder / f"heartbeat{suffix}"
        self._redaction = redaction
        self._at_start = at_start
        self._compile_events = compile_events
        self._num_compiled = 0
        self._inbox: deque[Any] = deque()
        self._wake = threading.Event()
        self._drained = threading.Condition()
        self._num_posted = 0
        self._num_written = 0
        self._is_ending = False
        self._next_beat = 0.0
        self._next_write = 0.0
        self._disk_is_refusing = False

    # -- from the training thread --------------------------------------------------------------------------------------------

    def post(self, record: Any) -> None:
        """Queue a record. Nothing wakes up for it: the writer looks every FLUSH_S."""
        if len(self._inbox) >= MAX_WAITING:  # a disk that hangs, not one that is slow
            self.num_dropped += 1
            return
        self._num_posted += 1
        self._inbox.append(record)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything posted so far was offered to the disk and to the trackers' queues; False after `timeout_s`."""
        wanted = self._num_posted
        self._wake.set()
        with self._drained:
            return self._drained.wait_for(lambda: self._num_written >= wanted or not self.is_alive(), timeout_s)

    def end(self, timeout_s: float) -> bool:
        """Write what is left and stop; False where the disk did not let it within `timeout_s`."""
        self._is_ending = True
        self._wake.set()
        self.join(timeout_s)
        return not self.is_alive()

    # -- on its own thread -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `end`: write, beat, watch the trackers."""
        self._guarded(self._at_start)
        while True:
            is_last = self._is_ending  # read before draining: what was posted before `end` is still written
            self._guarded(self._note_compilations)
            self._drain()
            self._beat()
            for worker in self.workers.values():
                worker.watch()
            if is_last:
                break
            self._wake.wait(FLUSH_S)
            self._wake.clear()
        lost = 0
        for lines in (self._metrics, self._events):
            self._guarded(lines.sync)
            lines.close()
            lost += lines.num_held + lines.num_lost
        if lost + self.num_dropped:
            log.warning("%d lines are missing from the run folder %s", lost + self.num_dropped, self.folder)

    def _drain(self) -> None:
        count = len(self._inbox)
        for _ in range(count):
            record = self._inbox.popleft()
            self._guarded(partial(self._write, record))
        now = time.monotonic()
        if now >= self._next_write or self._is_ending:
            self._guarded(self._metrics.write, retry=True)
            self._guarded(self._events.write, retry=True)
        with self._drained:
            self._num_written += count
            self._drained.notify_all()

    def _note_compilations(self) -> None:
        new = self._compile_events()[self._num_compiled :]
        self._num_compiled += len(new)
        for event in new:
            self._add_event(time.time(), "compile", asdict(event))

    def _beat(self) -> None:
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + HEARTBEAT_S
            self._guarded(self._heartbeat.touch)

    def _guarded(self, action: Callable[[], None], *, retry: bool = False) -> None:
        """Nothing that goes wrong with one record or with the disk ends this thread. It is said, once per kind."""
        try:
            action()
        except OSError as error:
            self._next_write = time.monotonic() + RETRY_S
            if not self._disk_is_refusing:
                self._disk_is_refusing = True
                log.warning(
                    "the run folder %s takes no more (%s); training goes on, up to 100000 lines are held until it does",
                    self.folder,
                    error.strerror or error,
                )
        except Exception as error:  # noqa: BLE001 - one record that cannot be written must not cost the others
            log.warning("a record was not written: %s", self._redaction.text(f"{type(error).__name__}: {error}"))
        else:
            if retry and self._disk_is_refusing and not self._metrics.num_held and not self._events.num_held:
                self._disk_is_refusing = False
                log.warning("the run folder %s takes lines again; those that were held are written", self.folder)

    def _write(self, record: Any) -> None:
        if isinstance(record, Metrics):
            self._write_metrics(record)
        elif isinstance(record, Event):
            self._add_event(record.time, record.event, record.facts)
        elif isinstance(record, Images):
            self._write_images(record)
        elif isinstance(record, Table):
            self._write_table(record)
        else:
            self._write_artifact(record)

    def _write_metrics(self, record: Metrics) -> None:
        values = settle(record.values)
        self._num_logs += 1
        numbers = {n: (self._num_logs, v) for n, v in flatten(values, "/").items() if type(v) in (int, float)}
        self.latest = {**self.latest, **numbers}  # a new one: other threads read it
        line = {"time": record.time, "step": record.step, "values": self._redaction.values(values)}
        if record.only is not None:
            line["only"] = record.only
        self._metrics.add(encode(line))
        self._pass_on(record, lambda tracker, options: tracker.log(values, step=record.step, **options))

    def _write_images(self, record: Images) -> None:
        files: dict[str, list[str]] = {}
        for name, images in record.values.items():
            for index, image in enumerate(images):
                file = artifacts.free_name(
                    self.folder / "images", f"{self._redaction.text(name)}-{_at(record.step)}-{index}", ".png"
                )
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(to_png(image))
                files.setdefault(name, []).append(str(file))
                relative = file.relative_to(self.folder).as_posix()
                self._add_event(record.time, "image", {"name": name, "step": record.step, "file": relative})

        def call(tracker: GeneralTracker, options: Mapping[str, Any]) -> None:
            values: Any = files if getattr(tracker, "takes_files", False) else dict(record.values)
            tracker.log_images(values, step=record.step, **options)

        self._pass_on(record, call)

    def _write_table(self, record: Table) -> None:
        rows = settle(record.rows)
        file = artifacts.free_name(
            self.folder / "tables", f"{self._redaction.text(record.name)}-{_at(record.step)}", ".json"
        )
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(self._redaction.values({"columns": record.columns, "rows": rows})))
        relative = file.relative_to(self.folder).as_posix()
        self._add_event(record.time, "table", {"name": record.name, "step": record.step, "file": relative})
        self._pass_on(
            record,
            lambda tracker, options: tracker.log_table(
                record.name, columns=record.columns, data=rows, step=record.step, **options
            ),
        )

    def _write_artifact(self, record: Artifact) -> None:
        facts, artifact = artifacts.keep(self.folder, record.artifact, record.name)
        self._add_event(record.time, "artifact", facts)
        self._pass_on(record, lambda tracker, options: tracker.log_artifact(artifact, name=facts["name"], **options))

    def _add_event(self, at: float, event: str, facts: Mapping[str, Any]) -> None:
        self._events.add(encode({"time": at, "event": event, **self._redaction.values(settle(facts))}))

    def _pass_on(self, record: Any, call: Callable[..., None]) -> None:
        for name, worker in self.workers.items():
            if record.only in (None, name):
                options = record.options.get(name, {})
                worker.put(partial(call, options=options))


def _at(step: int | None) -> str:
    return "no-step" if step is None else str(step)
