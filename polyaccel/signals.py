"""Signals that one process passes on to another: each once, and none into the last moments of a process that is leaving by itself."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_EVENT_S = 1.0  # a signal that comes again sooner is the same one, sent to a group and to its leader


class Recipient:
    """A child process, and what is known of the signals that it handles.

    Python takes a script's handlers down before it exits: a script that saved, on a signal that reached it by another way (Slurm's
    and systemd's go to every process of a job), and leaves with an exit code of its own would be killed by the same signal passed
    on to it then, and its exit code lost. So a process that has handled a signal before and does not now is left alone, at most
    for `patience_s` seconds. Where /proc does not tell (not Linux), signals are passed on at once.
    """

    def __init__(self, pid: int, patience_s: float) -> None:
        self.pid = pid
        self._patience_s = patience_s
        self._has_handled = 0  # one bit per signal, as in /proc
        self._sent: dict[signal.Signals, float] = {}
        self._put_off: dict[signal.Signals, float] = {}

    def observe(self) -> None:
        """Note which signals the process handles now. Call it now and then: a script sets its handlers when it likes."""
        self._has_handled |= _handled(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Pass a signal on, unless the same was a moment ago. The process must not have been waited for."""
        now = time.monotonic()
        if number in self._put_off or now - self._sent.get(number, -_SAME_EVENT_S) < _SAME_EVENT_S:
            return
        bit = 1 << (number - 1)
        if self._has_handled & bit and not _handled(self.pid) & bit:
            self._put_off[number] = now + self._patience_s
        else:
            self._kill(number)

    def send_due(self) -> None:
        """Pass on what was put off for long enough."""
        for number in [number for number, due in self._put_off.items() if time.monotonic() >= due]:
            del self._put_off[number]
            self._kill(number)

    def was_sent(self, number: signal.Signals) -> bool:
        """Whether the process got this signal from here, or is leaving and was spared it."""
        return number in self._sent or number in self._put_off

    def _kill(self, number: signal.Signals) -> None:
        self._sent[number] = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _handled(pid: int) -> int:
    """The signals for which a process has a handler, one bit each; 0 where that cannot be known, and of a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return 0
    line = status.partition("\nSigCgt:")[2].partition("\n")[0].strip()
    return int(line, 16) if line else 0
