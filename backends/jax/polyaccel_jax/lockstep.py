"""Processes run one program with the same constants, and give what is no batch alike: compared now and then, without waiting for it.

XLA compiles each process's program by itself and takes for granted that they are equal. A constant that differs between processes
is an error nowhere: their copies of the parameters drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final
from zlib import crc32

import numpy as np

from polyaccel.errors import PrepareError
from polyaccel.protocols import Collectives

_EVERY = 32  # calls between two comparisons; before that after 1, 2, 4, ...


class Said(NamedTuple):
    """What one call had: the user's name for it, constants of its program, and the values that enter it without a batch dim."""

    called: str
    constants: tuple[str, ...]
    values: tuple[tuple[str, int], ...]  # in words, and a checksum


@final
class Lockstep:
    """Keeps a running checksum of what the calls of this process had, and compares it with those of the others.

    Every process must note the same calls. A difference is an error at the latest 32 calls after it, and at once in the first.
    """

    def __init__(self, collectives: Collectives, *, reads_late: bool) -> None:
        self._collectives = collectives
        self._reads_late = reads_late  # one call later: the devices need not be waited for
        self._sum = self._count = 0
        self._calls: list[Said] = []
        self._asked: tuple[Any, list[Said]] | None = None
        self._sums: dict[tuple[str, ...], int] = {}

    def note(self, called: str, constants: tuple[str, ...], values: Sequence[tuple[str, int]]) -> None:
        """A program is about to run. Raises PrepareError, on all processes and naming what differs, where an earlier one differed."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._read(*asked)
        said = Said(called, constants, tuple(values))
        self._calls.append(said)
        known = self._sums.get(constants)
        if known is None:
            known = self._sums[constants] = crc32("\n".join(constants).encode())
        self._sum = crc32(repr((known, [checksum for _, checksum in said.values])).encode(), self._sum)
        self._count += 1
        if self._count % _EVERY == 0 or (self._count < _EVERY and self._count & (self._count - 1) == 0):
            sums = self._collectives.all_gather(np.asarray([self._sum], np.uint32))
            calls, self._calls = self._calls, []
            if self._reads_late and self._count > 1:
                self._asked = (sums, calls)
            else:
                self._read(sums, calls)

    def _read(self, sums: Any, calls: list[Said]) -> None:
        everyones = np.asarray(sums)
        if (everyones == everyones[0]).all():
            return
        everyone: list[list[Any]] = self._collectives.all_gather_object(
            [[said.called, list(said.constants), [list(value) for value in said.values]] for said in calls]
        )
        raise _error(everyone)


def _error(everyone: Sequence[Sequence[Any]]) -> PrepareError:
    for process, theirs in enumerate(everyone[1:], 1):
        for (called, first, values), (_, second, others) in zip(everyone[0], theirs, strict=True):
            found = _difference(first, second) or _difference(
                [f"an input {words}" for words, _ in values], [f"an input {words}" for words, _ in others]
            )
            if found is not None:
                return PrepareError(
                    f"{called} has {found[0]} on process 0 and {found[1]} on process {process}: what is no batch has one value in a"
                    " program of all processes, and their parameters would drift apart",
                    "give all processes the same; in a loop, a number that is to be each process's own is a tensor: torch.tensor(number)",
                )
            if values != others:
                words = next(mine[0] for mine, other in zip(values, others, strict=True) if mine != other)
                return PrepareError(
                    f"{called} has an input {words} with other values on process {process} than on process 0, and it has one value in a"
                    " program of all processes",
                    "give all processes the same, or give it one entry per sample as part of the batch",
                )
    return PrepareError(
        "the processes ran their programs in different orders", "let every process run the same training steps"
    )


def _difference(first: Sequence[str], second: Sequence[str]) -> tuple[str, str] | None:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return one, other
    if len(first) == len(second):
        return None
    longer = (first, second)[len(second) > len(first)][min(len(first), len(second))]
    return (longer, "nothing there") if len(first) > len(second) else ("nothing there", longer)
