"""Loader workers outlive a signal that their script handles: schedulers send it to every process of a job, and a worker would die of it.

A script that saves when it gets SIGTERM or SIGUSR1 still needs its next batch until then, and torch raises where a worker is gone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
InitWorker = Callable[[int], None]


def outliving(init: InitWorker | None) -> InitWorker | None:
    """The `worker_init_fn` for workers started now: `init` itself where this process handles neither signal."""
    handled = tuple(number for number in _SIGNALS if callable(signal.getsignal(number)))
    if not handled or not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return init
    return _Outliving(init, handled)


class _Outliving:
    """Runs first in a worker; may cross to a spawned process."""

    def __init__(self, init: InitWorker | None, signals: tuple[signal.Signals, ...]) -> None:
        self._init = init
        self._signals = signals

    def __call__(self, worker_id: int) -> None:
        if signal.SIGUSR1 in self._signals:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if signal.SIGTERM in self._signals:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before this process has another thread
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self._init is not None:
            self._init(worker_id)


def _end_with_parent(parent: int) -> None:
    """SIGTERM of the parent itself is how a loader ends its workers, and stays that."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)
