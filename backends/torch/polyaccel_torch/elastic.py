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
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any

from polyaccel.protocols import AgentJob
from polyaccel.signals import PASSED_ON, Recipient

_KEPT_LINES = 200
_POLL_S = 0.02
_MONITOR_S = 0.1


def arguments(job: AgentJob) -> list[str]:
    """What follows `python` to run the agent for a job."""
    return ["-m", "polyaccel_torch.elastic", json.dumps(asdict(job))]


def main(text: str) -> int:
    """Run the job; returns 0, or the exit code of the process that failed first (128 + N when signal N killed it)."""
    from torch.distributed.elastic import metrics
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    given = json.loads(text)
    job = AgentJob(**{**given, "command": tuple(given["command"])})
    stop = _Stop(job.grace_s, SignalException)
    stop.listen()
    handler: Any = stop
    metrics.configure(handler)
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
            "monitor_interval": _MONITOR_S,
            "start_method": "spawn",
            "logs_specs": DefaultLogsSpecs(log_dir=logs, tee=Std.ALL),
            "log_line_prefix_template": "[${rank}] ",
            "shutdown_timeout": job.grace_s,
            # Not those that are passed on: the agent would tell the signal's number for whatever code the processes end with.
            "signals_to_handle": "SIGHUP,SIGQUIT",
        }
        # shutdown_timeout and signals_to_handle are newer than the oldest torch that we run on.
        known = {f.name for f in fields(LaunchConfig)}
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
        finally:
            stop.close()
    return 0


def _traceback(logs: Path, local_rank: int) -> str:
    """The last traceback that a process wrote, from the agent's copy of its output in the last attempt."""
    files = sorted(logs.glob(f"**/{local_rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    lines = files[-1].read_text(errors="replace").splitlines()[-_KEPT_LINES:] if files else []
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-20:])


class _Stop:
    """Passes signals on to the processes. After SIGTERM or SIGINT their own exit codes decide, and none is started again.

    It is the agent's metrics handler too (`emit`), which is how it is called on the main thread in each round of the agent.
    """

    def __init__(self, grace_s: float, leave: Any) -> None:
        self.code: int | None = None
        self._grace_s = grace_s
        self._leave = leave  # torch's SignalException, which ends the agent
        self._number: int | None = None
        self._recipients: dict[int, Recipient] = {}

    def listen(self) -> None:
        """Install the handler, or install it again: the agent of torch 2.9 puts its own there whenever it starts processes."""
        for number in PASSED_ON:
            if signal.getsignal(number) != self.on_signal:
                signal.signal(number, self.on_signal)

    def close(self) -> None:
        """The job is over and its exit code settled: a late signal is not to change it."""
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)

    def emit(self, metric: Any) -> None:
        """Called by the agent for every number that it publishes."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.listen()
        if self._number is not None and metric.name.startswith("workers."):
            self._end()  # the exception raised by the handler was swallowed: before the agent starts the processes again
        for recipient in self._present().values():
            recipient.observe()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals that are passed on. It runs on the main thread and holds the agent up until all have left."""
        recipients = self._present()
        for recipient in recipients.values():
            recipient.send(signal.Signals(number))
        if number == signal.SIGUSR1 or self._number is not None:
            return  # SIGUSR1 asks the processes to save; after SIGTERM the first call waits already
        self._number = number
        self.code = self._await_end(recipients) if recipients else 128 + number
        self._end()

    def _end(self) -> None:
        assert self._number is not None
        raise self._leave(f"got signal {self._number}", sigval=signal.Signals(self._number))

    def _present(self) -> dict[int, Recipient]:
        """The processes that run now."""
        self._recipients = {pid: self._recipients.get(pid) or Recipient(pid, self._grace_s / 3) for pid in _children()}
        return self._recipients

    def _await_end(self, recipients: dict[int, Recipient]) -> int:
        """The exit code of the first that failed, or 0, once all have left or their time is over."""
        left, code = set(recipients), 0
        deadline = time.monotonic() + self._grace_s
        while left:
            for pid in sorted(left):
                recipients[pid].send_due()
                # Not reaped: the agent still asks for it.
                result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
                if result is not None:
                    left.remove(pid)
                    code = code or result.si_status + (0 if result.si_code == os.CLD_EXITED else 128)
            if left and time.monotonic() > deadline:
                for pid in left:
                    os.killpg(pid, signal.SIGKILL)  # each leads a session
                return code or 128 + signal.SIGKILL
            time.sleep(_POLL_S)
        return code


def _children() -> list[int]:
    """Processes of the agent that still run (Linux)."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found.append(int(pid))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
