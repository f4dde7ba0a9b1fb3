"""Leaving in good order when a machine is wanted back: on SIGTERM or SIGUSR1 all processes save the same step, once, and leave.

A process counts boundaries: the moments between two steps, after an optimizer update. One that is signalled tells the others through
the job's store, where a thread of each looks twice a second. From then on every main thread waits at its next boundary until the counts
of all are known; the step to save is one more than the highest of them, which each still has before it. Nothing is exchanged per step.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from polyaccel.config.schema import PREEMPTED
from polyaccel.errors import LaunchError
from polyaccel.store import Store

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.5  # between two looks at the store
_ANSWER_POLL_S = 0.02
_ANSWER_TIMEOUT_S = 120.0  # a process answers from a thread, whatever its main thread does
TRACKERS_S = 5.0  # to send what they hold: the exit code must not be late, and the run folder has all of it
_GOODBYE_S = 2 * POLL_S
_ENDED = "ended"

_numbers = itertools.count()  # Accelerators are made in the same order on all processes: each has keys of its own
log = logging.getLogger("polyaccel.preemption")


class Preemption:
    """Watches one process. The facade tells it of steps; a signal has an effect from `start` to `close`.

    Args:
        open_store: gives a connection to the job's store; not called in a job of one process.
        process_index, num_processes: this process in its job.
        outermost_loader: the prepared loader whose loop holds all others that run, if one runs. Then its requests for a batch are the
            boundaries, else the calls that begin a step.
        closes_window: whether the current micro batch ends in an update.
        project_dir: where `save` saves to; without one a signal ends the run with an error, and `start` says so.
        save: saves everything and returns when it is saved.
        leave: what is left to do before the process ends; called on all processes, after `save`.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        *,
        process_index: int,
        num_processes: int,
        outermost_loader: Callable[[], Any],
        closes_window: Callable[[], bool],
        project_dir: Any,
        save: Callable[[], Any],
        leave: Callable[[], Any],
    ) -> None:
        self._open_store = open_store
        self._process_index = process_index
        self._num_processes = num_processes
        self._outermost_loader = outermost_loader
        self._closes_window = closes_window
        self._project_dir = project_dir
        self._save = save
        self._leave = leave
        self._prefix = f"polyaccel.preemption/{next(_numbers)}"
        self._has_updated = False
        self._num_boundaries = 0
        self._is_noticed = False
        self._stop: int | None = None  # the boundary to save at, once it is agreed
        self._reason = ""
        self._failure: LaunchError | None = None
        self._is_settled = threading.Event()  # `_stop` or `_failure` is final; both None: the job has ended elsewhere
        self._received: SimpleQueue[str | None] = SimpleQueue()  # its put may interrupt itself, as a signal handler can
        self._is_closed = False
        self._is_leaving = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Handle the signals and look at the store. Off the main thread only the signals of other processes are heard."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        else:
            log.warning("preemption='save': this Accelerator is not on the main thread, which alone receives signals")
        if self._project_dir is None and self._process_index == 0:
            log.warning(
                "preemption='save': give Accelerator(project_dir=...), there is no place to save to on a signal"
            )
        if self._num_processes > 1:
            store = self._open_store()
            self._thread = threading.Thread(target=self._watch, args=(store,), name="preemption", daemon=True)
            self._thread.start()
        atexit.register(self.close)

    def prepared(self, loaders: Iterable[Any]) -> None:
        """Hear of every request for a batch of these prepared loaders."""
        for loader in loaders:
            if self.before_batch not in loader.before_batch:
                loader.before_batch.append(self.before_batch)

    # -- called by the facade, at every step -----------------------------------------------------------------------------------

    def before_batch(self, loader: Any) -> None:
        """A prepared loader is asked for a batch: the step before it is over, unless this is an evaluation inside the step."""
        if self._has_updated and self._outermost_loader() is loader:
            self._at_boundary()

    def before_call(self) -> None:
        """A call begins a step: the one before it is over, unless that is for a loader to say."""
        if self._has_updated and self._outermost_loader() is None:
            self._at_boundary()

    def after_backward(self) -> None:
        """Gradients were computed; if they close a window, an update follows."""
        if self._closes_window():
            self._has_updated = True

    def around(self, lift: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`lift` of a fused step's result, with the step noted."""

        def lifted(result: Any) -> Any:
            self.after_backward()
            return lift(result)

        return lifted

    def _at_boundary(self) -> None:
        self._has_updated = False
        # Before the question: whoever asks this thread to wait, and then reads the count, sees every boundary that it passed.
        self._num_boundaries += 1
        if self._is_noticed:
            self._wait_and_leave()

    def _wait_and_leave(self) -> None:
        self._is_settled.wait()
        if self._failure is not None:
            raise self._failure
        if self._stop is None or self._num_boundaries < self._stop:
            return
        log.warning("%s: saving after update %d, to leave with code %d", self._reason, self._num_boundaries, PREEMPTED)
        self._save()
        self._is_leaving = True
        self._leave()
        self.close()
        raise SystemExit(PREEMPTED)

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the signals back to whoever had them before, and tell the other processes that no boundary comes any more. Idempotent."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        if self._thread is not None:
            self._received.put(None)
            self._thread.join(_GOODBYE_S + POLL_S)
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                # Python takes handlers down early in its own end, but not this one: a second signal could hide the exit code.
                ignores = self._is_leaving or before is signal.SIG_IGN
                signal.signal(number, signal.SIG_IGN if ignores else before if callable(before) else signal.SIG_DFL)

    # -- signals -------------------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal and nothing else: it may have interrupted anything. Then whoever handled it before has a turn."""
        before = self._before.get(number)
        if os.getpid() == self._pid:
            self._notice(signal.Signals(number).name)
        elif not callable(before) and before is not signal.SIG_IGN:  # a forked child: what it would do without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if callable(before):
            before(number, frame)

    def _notice(self, name: str) -> None:
        if self._num_processes > 1:
            self._received.put(name)
        elif not self._is_noticed:
            self._reason, self._stop = name, self._num_boundaries  # whichever comes next
            self._is_settled.set()
            self._is_noticed = True

    # -- in the background ---------------------------------------------------------------------------------------------------------

    def _watch(self, store: Store) -> None:
        try:
            self._reason = self._await_notice(store)
            self._is_noticed = bool(self._reason)
            # The main thread passes no further boundary from here on, so this count is one that it has not yet passed by.
            store.set(self._count_key(self._process_index), str(self._num_boundaries))
            if self._reason:
                self._agree(store)
            elif self._process_index == 0:
                self._say_goodbye(store)
        except RuntimeError as error:
            log.info("the processes of this job can no longer agree on a step to save: %s", error)
        finally:
            self._is_settled.set()

    def _await_notice(self, store: Store) -> str:
        """Who was signalled, in words; empty when the job ends without a signal."""
        key = f"{self._prefix}/notice"
        while True:
            try:
                name = self._received.get(timeout=POLL_S)
            except Empty:
                found = store.get(key)
                if found is None:
                    continue
                return "" if found == _ENDED else found
            if name is not None:
                text = f"{name} (process {self._process_index})"
                store.set(key, text)
                return text
            if self._process_index == 0 and store.get(key) is None:
                store.set(key, _ENDED)  # process 0 may hold the store: the others stop looking before it goes
            return ""

    def _agree(self, store: Store) -> None:
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        counts: dict[int, int] = {}
        while len(counts) < self._num_processes:
            if self._is_closed:
                return  # past the last step
            for index in range(self._num_processes):
                text = None if index in counts else store.get(self._count_key(index))
                if text is not None:
                    counts[index] = int(text)
            if time.monotonic() > deadline:
                missing = ", ".join(str(index) for index in range(self._num_processes) if index not in counts)
                self._failure = LaunchError(
                    f"{self._reason}: process {missing} did not say within {_ANSWER_TIMEOUT_S:g} s which step it is in",
                    "look for an earlier error in its output, and give all processes the same setting `preemption`",
                )
                return
            time.sleep(_ANSWER_POLL_S)
        self._stop = max(counts.values()) + 1

    def _say_goodbye(self, store: Store) -> None:
        """Give the others the time to see that the job has ended, before the store may go with this process."""
        deadline = time.monotonic() + _GOODBYE_S
        others = [self._count_key(index) for index in range(1, self._num_processes)]
        while time.monotonic() < deadline and any(store.get(key) is None for key in others):
            time.sleep(_ANSWER_POLL_S)

    def _count_key(self, process_index: int) -> str:
        return f"{self._prefix}/count/{process_index}"
