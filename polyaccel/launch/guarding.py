"""A launcher's processes end with it, also where it is killed and can do nothing more: a guardian process sees to that."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import final

_GUARDIAN = Path(__file__).with_name("guardian.py")


@final
class Guardian:
    """Use as a context around the processes' life: it knows those of `watch`, until `forget`.

    Its own session keeps the signals of a terminal or a process group from it. Where somebody kills it, processes outlive a
    launcher that is killed as well, as they would without one.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARDIAN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Guardian:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.leave()
        self._process.wait()

    def watch(self, pid: int, *, with_group: bool) -> None:
        """End this process with the launcher; `with_group`: it leads a process group, which ends too."""
        self._say(f"{'group' if with_group else 'process'} {pid}")

    def forget(self, pid: int) -> None:
        """The process has been waited for: its number may be another's soon."""
        self._say(f"gone {pid}")

    def leave(self) -> None:
        """Close this process's end. A forked process does so first: while it holds one, the launcher's end is not seen."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
