"""Processes run one program with the same constants, and give what is no batch alike: compared now and then, beside the devices.

XLA compiles each process's program by itself and takes for granted that they are equal. A constant that differs between processes
is an error nowhere: their copies of the parameters drift apart.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, final
from zlib import crc32

from polyaccel.errors import PrepareError
from polyaccel.store import Store

_EVERY = 32  # calls between two comparisons; before that after 1, 2, 4, ...
_PATIENCE_S = 5.0  # for a process that is behind; where it stays away, its sum is compared when it comes
_number = itertools.count()  # of the Lockstep in its process: that of the same number is its counterpart elsewhere


class Said(NamedTuple):
    """What one call had: the user's name for it, constants of its program, and the values that enter it without a batch dim."""

    number: int  # from 1
    called: str
    constants: tuple[str, ...]
    values: tuple[tuple[str, int], ...]  # in words, and a checksum


@final
class Lockstep:
    """Keeps a running checksum of what the calls of this process had, and compares it with those of the others.

    Every process must note the same calls. A difference is an error at the latest 33 calls after it, and at once in the first: on
    process 0 and on each that differs from it. The texts go through the job's store, since an exchange on the devices would meet what
    another process may be waiting in.
    """

    def __init__(self, store: Store, process: int, num_processes: int) -> None:
        self._store = store
        self._process = process
        self._others = (
            range(1, num_processes) if process == 0 else (0,)
        )  # whose checksums this process compares with its own
        self._name = f"polyaccel/lockstep/{next(_number)}"
        self._sum = self._count = 0
        self._calls: list[Said] = []
        self._asked: tuple[int, int, list[Said]] | None = None
        self._sums: dict[tuple[str, ...], int] = {}

    def note(self, called: str, constants: tuple[str, ...], values: Sequence[tuple[str, int]]) -> None:
        """A program is about to run. Raises PrepareError, naming what differs, where this or an earlier call differed."""
        if self._asked is not None:
            self._read(self._asked, _PATIENCE_S if self._count == self._asked[0] else 0.0)
        self._count += 1
        said = Said(self._count, called, constants, tuple(values))
        self._calls.append(said)
        known = self._sums.get(constants)
        if known is None:
            known = self._sums[constants] = crc32("\n".join(constants).encode())
        self._sum = crc32(repr((known, [checksum for _, checksum in said.values])).encode(), self._sum)
        if self._count % _EVERY == 0 or (self._count < _EVERY and self._count & (self._count - 1) == 0):
            before = [] if self._asked is None else self._asked[2]  # of somebody who is far behind
            self._asked = (self._count, self._sum, before + self._calls)
            self._calls = []
            self._store.set(self._key(self._process, self._count), f"{self._count} {self._sum}")
            if self._count == 1:
                self._read(self._asked, _PATIENCE_S)

    def _key(self, process: int, count: int) -> str:
        # Two in turn: a process is hardly more than one comparison ahead, and a long run leaves no more texts than a short one.
        turn = count // _EVERY if count >= _EVERY else count.bit_length()
        return f"{self._name}/{turn % 2}/{process}"

    def _read(self, asked: tuple[int, int, list[Said]], patience_s: float) -> None:
        count, own, calls = asked
        until = time.monotonic() + patience_s
        for process in self._others:
            found = self._awaited(self._key(process, count), f"{count} ", until)
            if found is None:
                return  # it is looked for again
            if int(found) != own:
                self._store.set(f"{self._name}/said/{self._process}", json.dumps(calls))
                theirs = self._awaited(f"{self._name}/said/{process}", "", time.monotonic() + _PATIENCE_S)
                pair = {self._process: calls, process: [] if theirs is None else json.loads(theirs)}
                raise _error(pair[0], pair[max(pair)], max(pair))
        self._asked = None

    def _awaited(self, key: str, beginning: str, until: float) -> str | None:
        """The rest of a text that begins so, once it is there; None where it is not by then."""
        while True:
            text = self._store.get(key)
            if text is not None and text.startswith(beginning):
                return text.removeprefix(beginning)
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)


def _error(firsts: Sequence[Any], others: Sequence[Any], process: int) -> PrepareError:
    """What the calls of process 0 and of `process` differ in; without those of one, which of the other's it is."""
    theirs = {number: rest for number, *rest in others}
    for number, called, first, values in firsts:
        if number not in theirs:
            continue
        _, second, inputs = theirs[number]
        found = _difference(first, second) or _difference(
            [f"an input {words}" for words, _ in values], [f"an input {words}" for words, _ in inputs]
        )
        if found is not None:
            return PrepareError(
                f"{called} has {found[0]} on process 0 and {found[1]} on process {process}: what is no batch has one value in a"
                " program of all processes, and their parameters would drift apart",
                "give all processes the same; in a loop, a number that is to be each process's own is a tensor: torch.tensor(number)",
            )
        for (words, mine), (_, other) in zip(values, inputs, strict=True):
            if mine != other:
                return PrepareError(
                    f"{called} has an input {words} with other values on process {process} than on process 0, and it has one value in a"
                    " program of all processes",
                    "give all processes the same, or give it one entry per sample as part of the batch",
                )
    known = firsts or others
    return PrepareError(
        f"process {process} ran other programs than process 0, or gave them other values that are no batch, in one of the calls"
        f" {known[0][0]} to {known[-1][0]} (the last is {known[-1][1]})",
        "let every process run the same training steps",
    )


def _difference(first: Sequence[str], second: Sequence[str]) -> tuple[str, str] | None:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return one, other
    if len(first) == len(second):
        return None
    longer = (first, second)[len(second) > len(first)][min(len(first), len(second))]
    return (longer, "nothing there") if len(first) > len(second) else ("nothing there", longer)
