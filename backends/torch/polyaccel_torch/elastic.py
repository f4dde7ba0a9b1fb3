"""torch's elastic agent as a program: it starts this machine's processes, and the machines agree on every restart.

`polyaccel launch` runs it where a torch job has several machines or may be restarted (`TorchBackend.agent_arguments`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any

from polyaccel.protocols import AgentJob

_KEPT_LINES = 200
_END_NOW = signal.SIGQUIT


def arguments(job: AgentJob) -> list[str]:
    """What follows `python` to run the agent for a job."""
    return ["-m", "polyaccel_torch.elastic", json.dumps(asdict(job))]


def main(text: str) -> int:
    """Run the job; returns 0, or the exit code of the process that failed first (128 + N when signal N killed it)."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    given = json.loads(text)
    job = AgentJob(**{**given, "command": tuple(given["command"])})
    stop = _Stop()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.on_signal)
    with tempfile.TemporaryDirectory(prefix="polyaccel-agent-") as logs:
        options: dict[str, Any] = {
            "min_nodes": job.num_machines,
            "max_nodes": job.num_machines,
            "nproc_per_node": job.num_local_processes,
            "run_id": f"polyaccel-{job.port}",
            "rdzv_backend": "c10d",
            # On one machine any free port; on several, machine 0 serves where the others look.
            "rdzv_endpoint": f"{job.address}:{job.port}" if job.num_machines > 1 else "localhost:0",
            "rdzv_configs": {"is_host": job.machine_rank == 0, "timeout": job.join_timeout_s},
            # The agent that gets rank 0 names itself to the others; machine 0 has a name that they can reach.
            "local_addr": job.address if job.machine_rank == 0 and job.num_machines > 1 else None,
            "max_restarts": job.max_restarts,
            "monitor_interval": 0.1,
            "start_method": "spawn",
            "logs_specs": DefaultLogsSpecs(log_dir=logs, tee=Std.ALL),
            "log_line_prefix_template": "[${rank}] ",
            "shutdown_timeout": job.grace_s,
            # Not SIGTERM: the agent would tell the signal's number for whatever code the processes end with.
            "signals_to_handle": _END_NOW.name,
        }
        known = {f.name for f in fields(LaunchConfig)}  # shutdown_timeout is newer than the oldest torch that we run on
        config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
        try:
            elastic_launch(config, sys.executable)(*job.command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = int(failure.exitcode)
            code = 128 - code if code < 0 else code
            print(f"polyaccel launch: process {rank} failed with exit code {code}", file=sys.stderr)
            print(_traceback(Path(logs), failure.local_rank), file=sys.stderr)
            return code
        except SignalException as stopped:
            return 128 + int(stopped.sigval) if stop.code is None else stop.code
    return 0


def _traceback(logs: Path, local_rank: int) -> str:
    """The last traceback that a process wrote, from the agent's copy of its output in the last attempt."""
    files = sorted(logs.glob(f"**/{local_rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    lines = files[-1].read_text(errors="replace").splitlines()[-_KEPT_LINES:] if files else []
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-20:])


class _Stop:
    """Passes signals on to the processes. After SIGTERM or SIGINT their own exit codes decide, and none is started again."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._is_stopping = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGUSR1, SIGTERM and SIGINT."""
        children = _children()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGUSR1 or self._is_stopping:
            return  # SIGUSR1 asks the processes to save; the agent itself goes on
        self._is_stopping = True
        for pid in children:
            threading.Thread(target=self._await_end, args=(pid,), daemon=True).start()
        if not children:
            self._end(128 + number)

    def _await_end(self, pid: int) -> None:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the agent still collects it
        if result is not None:
            killed = result.si_code != os.CLD_EXITED
            self._end(result.si_status + (128 if killed else 0))

    def _end(self, code: int) -> None:
        self.code = self.code or code
        if code or not _children():
            os.kill(os.getpid(), _END_NOW)  # before the agent starts the failed process again


def _children() -> list[int]:
    """Processes of the agent that still run (Linux)."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(pid))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
