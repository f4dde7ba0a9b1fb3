"""run.json: what a run is and how it stands, replaced as a whole whenever that changes."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyaccel.errors import TrackerError
from polyaccel.redaction import Redaction
from polyaccel.tracking import surroundings
from polyaccel.tracking.files import replace

VERSION = 1
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")

log = logging.getLogger("polyaccel.tracking")


class RunRecord:
    """The run folder `<runs>/<project>/<run id>` and its run.json. Only the process that owns the run writes it."""

    def __init__(self, runs_dir: Path, project: str, run_id: str, redaction: Redaction, *, is_owner: bool) -> None:
        self.folder = (runs_dir / folder_name(project) / run_id).absolute()
        self.redaction = redaction
        self.is_resumed = False
        self._is_owner = is_owner
        self._lock = threading.Lock()
        self._facts: dict[str, Any] = {"version": VERSION, "id": run_id, "project": project}

    def open(self, config: Mapping[str, Any]) -> None:
        """Make the folder, or continue the run that is there. Raises TrackerError where that is impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackerError(
                f"the run folder {self.folder} cannot be made: {error.strerror}",
                "name a folder that can be written: Accelerator(project_dir=...)",
            ) from error
        file = self.folder / "run.json"
        now = time.time()
        if self._is_owner and file.exists():
            self._facts = self._previous(file)
            self.is_resumed = True
            self._facts.setdefault("resumed", []).append(now)
        self._facts.setdefault("created", now)
        self._facts.setdefault("trackers", {})
        self._facts.update(started=now, ended=None, status="running", error=None, config=dict(config))
        self._facts.update(surroundings.this_process())
        self._save()

    def identity(self, tracker: str) -> dict[str, Any]:
        """What a tracker noted in the part of the run that is continued."""
        found = self._facts.get("trackers", {}).get(tracker, {})
        return dict(found)

    def describe(self, environment: Mapping[str, str], engine: Mapping[str, Any], trackers: Sequence[str]) -> None:
        """Add what takes a moment to find out: versions, commit, host."""
        found = surroundings.describe(environment, self.redaction)
        with self._lock:
            self._facts.update(found)
            self._facts["engine"] = dict(engine)
            for name in trackers:
                self._facts["trackers"].setdefault(name, {})
        self._save()

    def note_tracker(self, name: str, identity: Mapping[str, Any]) -> None:
        """Keep what finds the run at a vendor again."""
        with self._lock:
            self._facts["trackers"][name] = self.redaction.values(dict(identity))
        self._save()

    def close(self, status: str, error: str | None, counts: Mapping[str, Any]) -> None:
        """Note the end."""
        with self._lock:
            self._facts.update(
                status=status, ended=time.time(), error=None if error is None else self.redaction.text(error)
            )
            self._facts["calls"] = dict(counts)
        self._save()

    def _previous(self, file: Path) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise TrackerError(
                f"{file} cannot be read: {error}", "move the folder away, or choose another run_id"
            ) from error
        if facts.get("version") != VERSION:
            raise TrackerError(
                f"{file} has version {facts.get('version')!r}, this polyaccel writes {VERSION}", "choose another run_id"
            )
        is_here = facts.get("host") == socket.gethostname()
        if (
            facts.get("status") == "running"
            and is_here
            and surroundings.is_alive(facts["pid"], facts["process_started"])
        ):
            raise TrackerError(
                f"run {facts['id']!r} is being written by process {facts['pid']} of this host",
                "choose another run_id, or wait until that process has ended",
            )
        return facts

    def _save(self) -> None:
        if not self._is_owner:
            return
        with self._lock:
            try:
                replace(self.folder / "run.json", self._facts)
            except OSError as error:
                log.warning("%s was not written: %s", self.folder / "run.json", error.strerror or error)


def folder_name(project: str) -> str:
    """A project's name as a folder: letters, digits, '.', '_' and '-'."""
    return _NOT_IN_NAMES.sub("_", project).strip(".") or "_"
