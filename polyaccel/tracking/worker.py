"""One daemon thread per tracker: a bounded queue, a circuit breaker, deadlines. Whatever a tracker does stays in here."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polyaccel.tracking.tracker import CannotTake, GeneralTracker

QUEUE_SIZE = 10_000
CALL_TIMEOUT_S = 60.0
FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 600.0

log = logging.getLogger("polyaccel.tracking")


@dataclass(slots=True)
class Counts:
    """What happened to the calls of one tracker."""

    sent: int = 0
    dropped: int = 0  # the queue was full, or the tracker ended before
    failed: int = 0  # the tracker raised


class Worker(threading.Thread):
    """Runs every call of one tracker, its construction included.

    A call that raises is dropped and counted; the run folder has what it carried. After FAILURES_TO_OPEN of them in a row, or one
    failed start, the circuit opens: calls wait in the queue for FIRST_PAUSE_S, twice as long after each further failure, and then
    one is tried. A full queue drops what is new.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], GeneralTracker],
        *,
        config: Mapping[str, Any],
        init_timeout_s: float,
        replay_command: str,
        hide: Callable[[str], str] = str,
        on_start: Callable[[str, dict[str, Any]], None] = lambda name, identity: None,
        first_pause_s: float = FIRST_PAUSE_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        super().__init__(name=f"polyaccel-tracker-{name}", daemon=True)
        self.tracker_name = name
        self.counts = Counts()
        self.tracker: GeneralTracker | None = None
        self.is_started = threading.Event()  # the tracker takes calls
        self.is_settled = threading.Event()  # it started, or its first start failed
        self._make = make
        self._config = config
        self._init_timeout_s = init_timeout_s
        self._call_timeout_s = call_timeout_s
        self._replay_command = replay_command
        self._hide = hide
        self._on_start = on_start
        self._first_pause_s = first_pause_s
        self._queue: deque[Callable[[GeneralTracker], Any]] = deque()
        self._size = queue_size
        self._changed = threading.Condition()
        self._is_ending = False
        self._busy_since: float | None = None
        self._said: set[str] = set()
        self._failures = 0
        self._opened_until = 0.0

    # -- from other threads ----------------------------------------------------------------------------------------------

    def put(self, call: Callable[[GeneralTracker], Any]) -> bool:
        """Queue a call; False where the queue is full or the tracker is ending."""
        with self._changed:
            if len(self._queue) < self._size and not self._is_ending:
                self._queue.append(call)
                self._changed.notify()
                return True
            self.counts.dropped += 1
        self._say("full", f"takes calls too slowly: {self._size} wait, what is new is dropped")
        return False

    def watch(self) -> None:
        """Say it, once, when a call takes longer than its deadline. Called every now and then by the writer."""
        since = self._busy_since
        if since is None:
            return
        limit = self._call_timeout_s if self.is_started.is_set() else self._init_timeout_s
        if time.monotonic() - since > limit:
            what = "answer" if self.is_started.is_set() else "start"
            self._say(f"slow {what}", f"did not {what} within {limit:g} s; training goes on without waiting for it")
            self.is_settled.set()

    def end(self) -> None:
        """Send what is queued, then finish; `wait_until` waits for it."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()

    def wait_until(self, deadline: float) -> bool:
        """Wait for the end of the thread, at most to this time.monotonic(); False, said once, where it is not over by then."""
        self.join(max(0.0, deadline - time.monotonic()))
        left = len(self._queue)
        if self.is_alive():
            self.counts.dropped += left
            self._queue.clear()
            self._say("finish", f"did not finish in time; {left} calls were not sent")
            if self.tracker is not None and hasattr(self.tracker, "abandon"):
                self.tracker.abandon()
            return False
        return True

    # -- on the tracker's own thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Calls, one after the other, until the end."""
        while True:
            with self._changed:
                while not self._may_go_on():
                    self._changed.wait(0.1 if self._opened_until else None)
                call = self._queue.popleft() if self._queue and self.tracker is not None else None
                is_over = call is None and self._is_ending and (self.tracker is not None or self._failures > 0)
            if is_over:
                break
            self._attempt(self._start if call is None else call)
        if self.tracker is not None:
            self._attempt(lambda tracker: tracker.finish(), ending=True)
        with self._changed:
            left = len(self._queue)
            self._queue.clear()
        if left or (self.tracker is None and self._failures):
            self.counts.dropped += left
            self._say("lost", f"ended without {left} calls")

    def _may_go_on(self) -> bool:
        if self._is_ending:
            return True
        if time.monotonic() < self._opened_until:
            return False
        return bool(self._queue) or self.tracker is None

    def _start(self, _: Any) -> None:
        made = self._make()
        made.start()
        if self._config:
            made.store_init_configuration(dict(self._config))
        self.tracker = made
        identity = made.identity() if hasattr(made, "identity") else {}
        self._on_start(self.tracker_name, identity)
        self.is_started.set()

    def _attempt(self, call: Callable[[Any], Any], *, ending: bool = False) -> None:
        is_start = self.tracker is None
        self._busy_since = time.monotonic()
        try:
            call(self.tracker)
        except CannotTake as error:
            self._say(error.message, f"has no place for {error.things}; they are kept in the run folder", is_lost=False)
        except Exception as error:  # noqa: BLE001 - a tracker's failure, of whatever kind, never reaches the training loop
            self._failed(error, is_start=is_start, ending=ending)
        else:
            self._failures = 0
            self._opened_until = 0.0
            self.counts.sent += not is_start and not ending
        finally:
            self._busy_since = None
            self.is_settled.set()

    def _failed(self, error: Exception, *, is_start: bool, ending: bool) -> None:
        self._failures += 1
        self.counts.failed += not is_start and not ending
        what = "start" if is_start else "finish" if ending else "take a call"
        self._say(f"failed to {what}", f"could not {what}: {type(error).__name__}: {error}")
        opens = is_start or self._failures >= FAILURES_TO_OPEN
        if opens:
            doublings = self._failures - (1 if is_start else FAILURES_TO_OPEN)
            self._opened_until = time.monotonic() + min(LONGEST_PAUSE_S, self._first_pause_s * 2**doublings)
        if self._is_ending and opens:  # nobody waits for a pause any more: what is left stays in the run folder
            with self._changed:
                self.counts.dropped += len(self._queue)
                self._queue.clear()

    def _say(self, topic: str, what: str, *, is_lost: bool = True) -> None:
        if topic in self._said:
            return
        self._said.add(topic)
        cure = f"; everything is in the run folder: {self._replay_command}" if is_lost else ""
        log.warning("tracker %r %s%s", self.tracker_name, self._hide(what), cure)
