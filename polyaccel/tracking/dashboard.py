"""Run folders in trackio's dashboard: replayed into a store of their own, which goes when the dashboard is closed.

The store is not trackio's usual one: runs that were logged there too would appear twice, and looking must change nothing. It is served
by a process of its own, because trackio chooses its store when it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from polyaccel.config.resolve import inherited_environment
from polyaccel.errors import TrackerError
from polyaccel.tracking.names import package_of
from polyaccel.tracking.replay import in_order, replay
from polyaccel.tracking.runs import Run
from polyaccel.tracking.vendors.trackio import TrackioTracker

_END_S = 10.0


def serve(runs: Sequence[Run], *, host: str, port: int | None, opens_browser: bool) -> int:
    """Show the runs until the user interrupts; returns the exit code. Raises TrackerError without trackio."""
    if package_of(TrackioTracker) is not None:
        raise TrackerError("the dashboard needs the package trackio", "pip install 'trackio>=0.30'")
    with tempfile.TemporaryDirectory(prefix="polyaccel-ui-") as store:
        # Without a server or a Space that the user's own logging may go to, and without asking the Hub who the user is.
        environment = {name: v for name, v in inherited_environment().items() if not name.startswith("TRACKIO_")}
        environment |= {"TRACKIO_DIR": store, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", __name__, "--host", host]
        command += [] if port is None else ["--port", str(port)]
        command += [] if opens_browser else ["--no-browser"]
        command += ["--", store, *(str(run.folder) for run in runs)]
        with subprocess.Popen(command, env=environment) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the dashboard as well
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                return 0


def fill(store: Path, runs: Sequence[Run]) -> None:
    """Replay runs into the store of the trackio that this process imports."""
    for run in reversed(runs):  # the oldest first
        with contextlib.redirect_stdout(io.StringIO()):  # how trackio greets every run
            sent = replay(run, "trackio", auto_log_gpu=False, auto_log_cpu=False)
        if not _date_back(store, run):
            print(f"{run.id}: trackio's time axis is that of now; steps are those of the run", file=sys.stderr)
        print(
            f"{run.project} / {run.id}: {sent.num_metrics} log calls, {sent.num_images} images, {sent.num_tables} tables",
            flush=True,
        )


def _date_back(store: Path, run: Run) -> bool:
    """Give the rows of a run the times at which they were logged; trackio writes down when they were sent. False: it cannot be done."""
    times = [
        line["time"] for kind, line in in_order(run) if kind != "artifact" and line.get("only") in (None, "trackio")
    ]
    for file in store.glob("*.db"):
        try:
            with sqlite3.connect(file) as connection:
                found = connection.execute(
                    "SELECT id FROM metrics WHERE run_name = ? ORDER BY id", (run.id,)
                ).fetchall()
                if len(found) == len(times):
                    stamps = (datetime.fromtimestamp(at, UTC).isoformat() for at in times)
                    rows = [(stamp, row) for stamp, (row,) in zip(stamps, found, strict=True)]
                    connection.executemany("UPDATE metrics SET timestamp = ? WHERE id = ?", rows)
                    return True
        except sqlite3.Error:
            continue  # another version of trackio keeps them elsewhere
    return False


def _main() -> None:
    import trackio

    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", nargs="+", type=Run.load)
    options = parser.parse_args()
    fill(options.store, options.runs)
    projects = {run.project for run in options.runs}
    trackio.show(
        project=projects.pop() if len(projects) == 1 else None,
        host=options.host,
        server_port=options.port,
        open_browser=not options.no_browser,
        share=False,
        block_thread=True,
    )


if __name__ == "__main__":
    _main()
