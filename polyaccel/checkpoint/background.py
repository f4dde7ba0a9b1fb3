"""One checkpoint at a time, written while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Writer:
    """Runs one callable at a time on a thread of its own.

    `submit` and `wait` raise what the previous callable raised, once. The thread is no daemon: a script that ends without `wait` ends
    after its checkpoint is complete, and a failure that nobody can be told of any more is in the log, as every failure is.
    """

    def __init__(self, name: str = "polyaccel-checkpoint") -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a callable is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, write: Callable[[], object]) -> None:
        """Start `write` once the previous one is done: never are the contents of more than two checkpoints in memory."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name=self._name, daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is running. Raises what the last callable raised, unless that was raised before."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised again where the script can see it
            self._failure = error
            log.error("a checkpoint was not written: %s", error)
