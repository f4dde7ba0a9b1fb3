"""Host batches read by a thread of this process while earlier ones are used; the order and the values stay those of the loader."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from polyaccel.errors import UnsupportedError

_END = object()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def read_ahead(source: Iterator[Any], depth: int, generators: Callable[[], Any]) -> Iterator[Any]:
    """The items of `source` in its order, up to `depth` of them read by a thread before they are asked for.

    The first two items are read by the caller itself: the first draws the order of the pass, and the second shows whether reading
    draws from generators that the script shares with it (`generators()` gives their states). Such a loader is refused with
    UnsupportedError: its numbers would depend on when the thread runs. An error of `source` is raised where its item was due.
    Leaving the iterator ends the thread, after the read that it is in.
    """
    if (first := next(source, _END)) is _END:
        return
    yield first
    before = generators()
    if (second := next(source, _END)) is _END:
        return
    if generators() != before:
        raise UnsupportedError(
            "read_in_background=True, and reading a batch of this loader draws random numbers from generators that the script"
            " uses too: its numbers would depend on timing",
            "leave read_in_background out, give the torch DataLoader num_workers=1, or draw from a generator of the dataset's own",
        )
    yield second
    yield from _read_by_thread(source, depth)


def _read_by_thread(source: Iterator[Any], depth: int) -> Iterator[Any]:
    ready: queue.Queue[Any] = queue.Queue(max(1, depth))
    left = threading.Event()

    def put(item: Any) -> None:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for item in source:
                put(item)
                if left.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised in the loop over the batches, where the user's own code sees it
            put(_Failure(error))
        else:
            put(_END)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=read, name="polyaccel-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        left.set()
        if not sys.is_finalizing():  # a thread gets no turn any more then
            thread.join()
