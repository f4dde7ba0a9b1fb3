"""What the machines of a job are told to do: machine 0 decides, from what they report. No sockets, no processes and no clock here.

An attempt is one start of all processes. It ends on every machine when one process fails anywhere or when a machine is lost; then the
job begins its next attempt, with all machines or with those that are left, or it is over.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from polyaccel.config.schema import PREEMPTED

_LONGEST_PAUSE_S = 30.0
_ENDS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that has come: its rank, the name it has for itself, and how many processes it starts."""

    rank: int
    host: str
    num_processes: int

    def __str__(self) -> str:
        return f"machine {self.rank} ({self.host})"


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of the job, which are those of machine 0."""

    num_machines: int
    min_machines: int
    max_restarts: int
    join_timeout_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended. `weight` orders failures that come together: a lost machine explains the others best."""

    code: int
    words: str
    weight: int


def pause_before(restart: int) -> float:
    """Seconds before the restart of this number, from 1: 1, 2, 4, ... 30."""
    return min(2.0 ** (restart - 1), _LONGEST_PAUSE_S)


def outcome(code: int) -> str:
    """How a process ended, in words: `code` is 128 + N where signal N killed it."""
    if code - 128 in signal.valid_signals():
        return f"was killed by {_signal_name(code - 128)}"
    if code == PREEMPTED:
        return f"has saved its state and left (exit code {code})"
    return f"failed with exit code {code}"


def _signal_name(number: int) -> str:
    names = {int(one): one.name for one in signal.Signals}
    return names.get(number, f"signal {number}")


class Leader:
    """Calls come in as machines report; `outbox` holds what is to be said, as (rank, message).

    Messages: `wait` (words), `start` (attempt, first, num_processes, machines, port), `signal` (number), `stop` (attempt, words),
    `restart` (words), `finish` (code, words). `is_over` is True once every machine has been told to finish.
    """

    def __init__(self, rules: Rules, *, choose_port: Callable[[int], int], now: float) -> None:
        self.outbox: deque[tuple[int, dict[str, Any]]] = deque()
        self.is_over = False
        self._rules = rules
        self._choose_port = choose_port
        self._machines: dict[int, Machine] = {}
        self._first: dict[int, int] = {}  # of each machine that takes part: its first process
        self._left: set[int] = set()  # machines whose processes run
        self._attempt = -1
        self._restarts = 0
        self._failure: Failure | None = None
        self._signal = 0  # SIGTERM or SIGINT, once it came
        self._not_before = now
        self._deadline = now + rules.join_timeout_s

    # -- what machines report ------------------------------------------------------------------------------------------

    def joined(self, machine: Machine, now: float) -> None:
        """A machine's launcher has come; it takes part from the next attempt on."""
        if machine.rank in self._machines:
            self.lost(machine.rank, "its launcher was started again", now)
        self._machines[machine.rank] = machine
        if self._left:
            self._tell([machine.rank], type="wait", words="the job runs without this machine: it waits for a restart")
        self.tick(now)

    def failed(self, rank: int, attempt: int, process: int, code: int) -> None:
        """A process of this attempt has failed; the machine is about to end its others."""
        if attempt == self._attempt and rank in self._left:
            words = f"process {process} on {self._machines[rank]} {outcome(code)}"
            is_killed = 128 < code != 128 + signal.SIGTERM
            self._fail(Failure(code, words, 1 + is_killed), self._left - {rank})

    def ended(self, rank: int, attempt: int, now: float) -> None:
        """No process of this attempt is left on a machine."""
        if attempt == self._attempt and rank in self._left:
            self._left.remove(rank)
            self._settle(now)

    def signalled(self, rank: int, number: int) -> None:
        """A machine's launcher got a signal, which is for the whole job."""
        if number in _ENDS:
            self._signal = self._signal or number
        self._tell([other for other in self._machines if other != rank], type="signal", number=number)
        if self._signal and not self._left:
            self._finish(128 + self._signal, f"{_signal_name(self._signal)} on {self._machines[rank]}")

    def lost(self, rank: int, why: str, now: float) -> None:
        """A machine can no longer be reached."""
        machine = self._machines.pop(rank, None)
        if machine is None or self.is_over:
            return
        if rank in self._left:
            self._left.remove(rank)
            first = self._first[rank]
            numbers = ", ".join(str(first + index) for index in range(machine.num_processes))
            noun = "process" if machine.num_processes == 1 else "processes"
            self._fail(Failure(1, f"{machine} with {noun} {numbers} is lost: {why}", 3), self._left)
            self._settle(now)

    # -- what follows --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed: begin the next attempt if it is due, or give up."""
        if self.is_over or self._left or now < self._not_before:
            return
        rules, present = self._rules, len(self._machines)
        if present == rules.num_machines:
            self._begin(present)
        elif now >= self._deadline:
            # Only a divisor of all machines keeps the global batch with whole numbers of batches, whatever it is made of.
            sizes = [n for n in range(rules.min_machines, present + 1) if rules.num_machines % n == 0]
            if sizes and 0 in self._machines:
                self._begin(sizes[-1])
            else:
                missing = ", ".join(str(rank) for rank in range(rules.num_machines) if rank not in self._machines)
                noun = "machine" if present == rules.num_machines - 1 else "machines"
                words = f"{noun} {missing} did not come within {rules.join_timeout_s:g} s (join_timeout_s)"
                before = self._failure
                self._finish(before.code if before else 1, f"{before.words}; {words}" if before else words)

    def _begin(self, size: int) -> None:
        self._attempt += 1
        self._failure = None
        ranks = sorted(self._machines)[:size]
        self._first, total = {}, 0
        for rank in ranks:
            self._first[rank] = total
            total += self._machines[rank].num_processes
        self._left = set(ranks)
        port = self._choose_port(self._attempt)
        for rank in ranks:
            place = {"first": self._first[rank], "num_processes": total, "machines": size, "port": port}
            self._tell([rank], type="start", attempt=self._attempt, **place)
        waiting = [rank for rank in self._machines if rank not in self._left]
        self._tell(waiting, type="wait", words=f"the job goes on with {size} of {self._rules.num_machines} machines")

    def _fail(self, failure: Failure, others: set[int]) -> None:
        is_first = self._failure is None
        if self._failure is None or failure.weight > self._failure.weight:
            self._failure = failure
        if is_first and not self._signal:  # after a signal each process has its time to leave
            self._tell(others, type="stop", attempt=self._attempt, words=failure.words)

    def _settle(self, now: float) -> None:
        if self._left:
            return
        failure, rules = self._failure, self._rules
        if failure is None:
            self._finish(0, "")
        elif self._signal or failure.code == PREEMPTED or self._restarts == rules.max_restarts:
            self._finish(failure.code, failure.words)
        else:
            self._restarts += 1
            pause_s = pause_before(self._restarts)
            self._not_before = now + pause_s
            self._deadline = max(self._not_before, now + rules.join_timeout_s)
            words = f"{failure.words}; restart {self._restarts} of {rules.max_restarts} in {pause_s:g} s"
            self._tell(self._machines, type="restart", words=words)

    def _finish(self, code: int, words: str) -> None:
        self._tell(self._machines, type="finish", code=code, words=words)
        self.is_over = True

    def _tell(self, ranks: Iterable[int], **message: Any) -> None:
        told: Mapping[str, Any] = message
        self.outbox.extend((rank, dict(told)) for rank in sorted(ranks))
