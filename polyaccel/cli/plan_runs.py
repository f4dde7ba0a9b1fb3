"""Starts the process of one plan, shows how long it has been at work, and ends it when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from polyaccel.errors import LaunchError

_LINES_OF_OUTPUT = 15
_SHOWN_EVERY_S = 15.0


def run_worker(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    what: str,
    hint: str,
    timeout_s: float | None,
    shown_every_s: float = _SHOWN_EVERY_S,
) -> None:
    """Run `python -m polyaccel.cli.plan_worker` with these arguments, its output kept for the error alone.

    The time that passes is shown on stderr. Raises LaunchError where it fails, or is not done after `timeout_s` seconds; all of
    its processes are ended then. They end as well when this process does, however that ends: they hold a pipe of it.
    """
    theirs, ours = os.pipe()
    command = [sys.executable, "-m", "polyaccel.cli.plan_worker", str(theirs), *arguments]
    with os.fdopen(ours, "wb"), tempfile.TemporaryFile("w+b") as output:
        # A session of its own: loaders may have started processes, which hold on to the files of this one.
        try:
            worker = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(theirs,),
            )
        finally:
            os.close(theirs)
        start = time.monotonic()
        is_late = False
        try:
            while worker.poll() is None and not is_late:
                passed = time.monotonic() - start
                left = float("inf") if timeout_s is None else timeout_s - passed
                is_late = left <= 0
                if not is_late:
                    _wait(worker, min(shown_every_s - passed % shown_every_s, left))
                    if worker.poll() is None:
                        _show(f"  {what}: {time.monotonic() - start:.0f} s")
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        output.seek(0)
        last = "\n".join(output.read().decode("utf-8", "replace").splitlines()[-_LINES_OF_OUTPUT:])
    if is_late:
        raise LaunchError(
            f"{what} is not done after {timeout_s:g} seconds:\n{last}",
            "give it more with --timeout, or plan a smaller step",
        )
    if worker.returncode:
        raise LaunchError(f"{what} failed (exit code {worker.returncode}):\n{last}", hint)


def _wait(worker: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
