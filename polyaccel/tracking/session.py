"""The trackers of one Accelerator: what the facade forwards to. It starts runs, takes what is logged, and ends in bounded time."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyaccel.config.project import ProjectConfiguration
from polyaccel.config.resolve import inherited_environment
from polyaccel.errors import TrackerError, nearest
from polyaccel.looking.meter import settle
from polyaccel.redaction import Redaction
from polyaccel.tracking import names, values
from polyaccel.tracking.handles import Absorber, TrackerHandle
from polyaccel.tracking.png import take_image
from polyaccel.tracking.record import RunRecord
from polyaccel.tracking.tracker import RunInfo
from polyaccel.tracking.worker import Worker
from polyaccel.tracking.writer import Artifact, Event, Images, Metrics, RunWriter, Table

FLUSH_TIMEOUT_S = 10.0
_NO_OPTIONS: Mapping[str, Any] = {}

log = logging.getLogger("polyaccel.tracking")

_keeps_runs = True


@contextmanager
def without_runs() -> Iterator[None]:
    """Sessions that start inside log nothing: no run folder, no tracker."""
    global _keeps_runs
    before, _keeps_runs = _keeps_runs, False
    try:
        yield
    finally:
        _keeps_runs = before


class Session:
    """Where the metrics of one process go. Nothing is created before `start` or the first thing logged.

    Args:
        log_with: see `names.choose`.
        project: where runs are kept, and the deadlines.
        process_index: of this process; process 0 owns the run.
        describe: gives what the run notes of the engine (backend, devices, mesh), asked once at the start.
        compile_events: gives the engine's CompileEvents so far; they are noted as they come.
        share: gives every process the value of process 0; called only where a tracker wants every process.
    """

    def __init__(
        self,
        log_with: Any,
        project: ProjectConfiguration,
        *,
        process_index: int = 0,
        describe: Callable[[], Mapping[str, Any]] = dict,
        compile_events: Callable[[], Sequence[Any]] = tuple,
        share: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._asked = names.choose(log_with)
        self.project = project
        self.init_timeout_s = project.tracker_init_timeout_s
        self._process_index = process_index
        self._describe = describe
        self._compile_events = compile_events
        self._share = share
        self._workers: list[Worker] = []
        self._writer: RunWriter | None = None
        self._record: RunRecord | None = None
        self._waiting: list[values.Late] = []
        self._held: list[Any] = []
        self._is_off = False  # ended, or a process that logs nothing
        self._lock = threading.Lock()

    @property
    def is_main_process(self) -> bool:
        """Whether this process owns the run."""
        return self._process_index == 0

    @property
    def folder(self) -> Path | None:
        """The run folder, once there is one."""
        return None if self._record is None else self._record.folder

    @property
    def latest(self) -> Mapping[str, tuple[int, float]]:
        """By name the number of the log call and the last number logged, as far as they have come from the devices."""
        return {} if self._writer is None else self._writer.latest

    # -- start -----------------------------------------------------------------------------------------------------------------

    def start(
        self,
        project_name: str,
        config: Any = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] = _NO_OPTIONS,
    ) -> None:
        """Create or continue the run folder, and start the trackers on their threads. Returns without waiting for them."""
        if not _keeps_runs:
            self._is_off = True
            return
        everywhere = [one for one in self._asked if not getattr(one, "main_process_only", True)]
        run_id = self.project.run_id or _new_id()
        if everywhere:
            run_id = self._share(run_id)
        chosen = self._asked if self.is_main_process else everywhere
        if not chosen and not self.is_main_process:
            self._is_off = True
            return
        if self._writer is not None:
            raise TrackerError(
                f"the run {self.folder} has been started, so init_trackers({project_name!r}) cannot start another",
                "call init_trackers once, before the first log; end_training ends the run",
            )
        unknown = set(init_kwargs) - {self._name_of(one) for one in self._asked} - set(names.tracker_names())
        if unknown:
            raise TrackerError(
                f"init_kwargs has options for {sorted(unknown)[0]!r}, which is no tracker",
                nearest(sorted(unknown)[0], names.tracker_names()),
            )
        self._start(project_name, run_id, values.plain_config(config or {}), init_kwargs, chosen)

    def _start(
        self,
        project_name: str,
        run_id: str,
        config: dict[str, Any],
        init_kwargs: Mapping[str, Any],
        chosen: Sequence[Any],
    ) -> None:
        environment = inherited_environment()
        redaction = Redaction(environment)
        hidden = redaction.tree(config)
        redaction.arguments(sys.argv)  # learns what was given as `--api-key x`
        record = RunRecord(self.project.runs_dir, project_name, run_id, redaction, is_owner=self.is_main_process)
        record.open(hidden)
        info = RunInfo(run_id, project_name, record.folder, hidden, record.is_resumed, {}, self.is_main_process)
        self._record = record
        self._workers = [self._worker(one, info, record, init_kwargs) for one in chosen]
        describe = dict(self._describe())

        def at_start() -> None:
            record.describe(environment, describe, [worker.tracker_name for worker in self._workers])

        self._writer = RunWriter(
            record.folder,
            redaction,
            self._workers,
            process_index=self._process_index,
            at_start=at_start,
            compile_events=self._compile_events,
        )
        self._event("resume" if record.is_resumed else "start", {"pid": os.getpid()})
        atexit.register(self._at_exit)
        self._pid = os.getpid()
        self._writer.start()
        for worker in self._workers:
            worker.start()

    def _worker(
        self, one: Any, info: RunInfo, record: RunRecord, init_kwargs: Mapping[str, Mapping[str, Any]]
    ) -> Worker:
        name = self._name_of(one)
        options = dict(init_kwargs.get(name, {}))
        mine = RunInfo(
            info.id,
            info.project,
            info.folder,
            info.config,
            info.is_resumed,
            record.identity(name),
            info.is_main_process,
        )

        def make() -> Any:
            tracker = one
            if isinstance(one, type):
                kind: Any = one
                needs_folder = kind.requires_logging_directory
                tracker = kind(info.project, *([str(info.folder)] if needs_folder else []), **options)
            tracker.run = mine
            return tracker

        def on_start(name: str, identity: dict[str, Any]) -> None:
            record.note_tracker(name, identity)
            # Vendors register exit handlers of their own when they start; ours has to run before them, so it is registered last.
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)

        return Worker(
            name,
            make,
            config=info.config,
            init_timeout_s=self.project.tracker_init_timeout_s,
            replay_command=f"polyaccel runs replay {shlex.quote(str(record.folder))} --to {name}",
            hide=record.redaction.text,
            on_start=on_start,
        )

    @staticmethod
    def _name_of(one: Any) -> str:
        return str(one.name)

    def _writes(self) -> RunWriter | None:
        """The writer, started without trackers where the script logs before init_trackers; None where this process logs nothing."""
        if self._writer is None and not self._is_off:
            if not self.is_main_process:
                self._is_off = True
                return None
            if self._asked:
                log.warning(
                    "log was called before init_trackers: only the run folder is written, the trackers do not start"
                )
            script = Path(sys.argv[0] or "interactive").stem
            self._start(script or "interactive", self.project.run_id or _new_id(), {}, {}, [])
        return None if self._is_off else self._writer

    # -- what is logged ------------------------------------------------------------------------------------------------------

    def log(
        self,
        logged: Mapping[str, Any],
        step: int | None = None,
        options: Mapping[str, Any] = _NO_OPTIONS,
        only: str | None = None,
    ) -> None:
        """Queue metrics; costs a few microseconds, never waits for a device, a disk or a network."""
        writer = self._writer if self._writer is not None and not self._is_off else self._writes()
        if writer is None:
            return
        if self._held:
            self._release(writer)
        waiting: list[values.Late] = []
        record = Metrics(time.time(), step, values.take(logged, waiting), options, only)
        if waiting:
            self._waiting = waiting
            self._held.append(record)
        else:
            writer.post(record)

    def log_images(
        self,
        images: Mapping[str, Any],
        step: int | None = None,
        options: Mapping[str, Any] = _NO_OPTIONS,
        only: str | None = None,
    ) -> None:
        """Queue images by name: one, or a list of them."""
        self._post(
            lambda: Images(
                time.time(),
                step,
                {name: [take_image(one) for one in _images(value)] for name, value in images.items()},
                options,
                only,
            )
        )

    def log_table(
        self,
        name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        options: Mapping[str, Any] = _NO_OPTIONS,
        only: str | None = None,
    ) -> None:
        """Queue a table, of `columns` and rows or of a dataframe."""
        if dataframe is not None:
            columns, data = [str(column) for column in dataframe.columns], dataframe.to_numpy().tolist()
        if columns is None or data is None:
            raise TrackerError(
                f"log_table({name!r}) got no rows", "pass columns=[...] and data=[[...], ...], or dataframe="
            )
        rows = [values.take({"row": list(row)}, [])["row"] for row in data]
        self._post(lambda: Table(time.time(), step, name, list(columns), rows, options, only))

    def log_artifact(
        self,
        artifact: Any,
        name: str | None = None,
        options: Mapping[str, Any] = _NO_OPTIONS,
        only: str | None = None,
    ) -> None:
        """Keep a file: returns when a small one is copied, so that the script may change or delete it."""
        self._post(lambda: Artifact(time.time(), artifact, name, options, only))
        if isinstance(artifact, (str, Path)):
            self.flush()

    def event(self, name: str, **facts: Any) -> None:
        """Note a fact about the run (a checkpoint, a compilation) in events.jsonl, if there is a run."""
        if self._writer is not None and not self._is_off:
            self._event(name, facts)

    def _event(self, name: str, facts: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._writer.post(Event(time.time(), name, dict(facts)))

    def _post(self, make: Callable[[], Any]) -> None:
        writer = self._writes()
        if writer is not None:
            self._release(writer)
            writer.post(make())

    def _release(self, writer: RunWriter) -> None:
        values.start(self._waiting)
        held, self._held, self._waiting = self._held, [], []
        for record in held:
            writer.post(record)

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Return when everything logged so far was handed to the operating system and to the trackers' queues; False if late."""
        if self._writer is None or self._is_off:
            return True
        self._release(self._writer)
        return self._writer.flush(timeout_s)

    # -- trackers ------------------------------------------------------------------------------------------------------------

    def get(self, name: str, unwrap: bool = False) -> Any:
        """The tracker of that name, or with `unwrap` the vendor's own run object. Off the main process: an `Absorber`.

        Raises TrackerError on the main process for a name that is not among the started trackers, and with `unwrap` where the
        tracker has not started within its deadline.
        """
        for worker in self._workers:
            if worker.tracker_name == name:
                handle = TrackerHandle(self, worker)
                return handle.tracker if unwrap else handle
        if not self.is_main_process:
            return Absorber()
        known = [worker.tracker_name for worker in self._workers]
        hint = nearest(name, known) if known else "name it in Accelerator(log_with=...) and call init_trackers first"
        raise TrackerError(f"get_tracker({name!r}): no such tracker was started", hint)

    @property
    def trackers(self) -> list[TrackerHandle]:
        """A handle of every started tracker, in the order of `log_with`."""
        return [TrackerHandle(self, worker) for worker in self._workers]

    # -- end -------------------------------------------------------------------------------------------------------------------

    def finish(self, status: str = "finished", error: str | None = None) -> None:
        """Write what is left, finish all trackers at the same time, and return after `tracker_finish_timeout_s` at the latest.

        Idempotent. A tracker that did not finish is named in the log, with the command that sends it the run.
        """
        if self._writer is not None and not self._is_off:
            settle(FLUSH_TIMEOUT_S)  # loops whose last steps the device has just done are noted
        with self._lock:
            if self._is_off or self._writer is None:
                self._is_off = True
                return
            self._is_off = True
        atexit.unregister(self._at_exit)
        deadline = time.monotonic() + self.project.tracker_finish_timeout_s
        writer, record = self._writer, self._record
        assert record is not None
        self._release(writer)
        if writer.flush(self.project.tracker_finish_timeout_s):
            for worker in self._workers:
                worker.end()
            for worker in self._workers:
                worker.wait_until(deadline)
        counts = {
            worker.tracker_name: {"sent": c.sent, "failed": c.failed, "dropped": c.dropped}
            for worker in self._workers
            for c in [worker.counts]
        }
        self._event("end", {"status": status, "error": error, "trackers": counts})
        writer.end(FLUSH_TIMEOUT_S)
        record.close(status, error, counts)

    def _at_exit(self) -> None:
        """The script ended without end_training: by an exception, or by itself."""
        if os.getpid() != self._pid:
            return  # a forked child
        failure = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        error = None if failure is None else f"{type(failure).__name__}: {failure}"
        self.finish("finished" if failure is None else "crashed", error)


def _new_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _images(value: Any) -> list[Any]:
    """The images of one name: a list, an array of them with dims (count, height, width, channels), or a single one."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value) if len(getattr(value, "shape", ())) == 4 else [value]
