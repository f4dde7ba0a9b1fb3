"""The numbers and options of a recorded loop that are constants of its program, in words: processes must have them alike."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .packing import described, thaw

if TYPE_CHECKING:
    from .recordings import Entry
    from .tape_calls import Part, Place

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, enum.Enum, range, slice, type(None))


def constants_of(parts: Sequence[Part], loss: Place) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One text per operation that the loss is computed by, such as `pow(tensor, 2.0)`; those of model calls apart.

    What else a process computes, to look at it, is its own business. Numbers that are inputs are none of the program's.
    """
    needed = _computing(parts, loss)
    operations: list[str] = []
    models: list[str] = []
    for index, part in enumerate(parts):
        for entry in part.entries:
            if (index, entry.position) in needed:
                (operations if entry.model is None else models).append(_text(entry))
    return tuple(operations), tuple(models)


def _computing(parts: Sequence[Part], loss: Place) -> frozenset[tuple[int, int]]:
    entries = {(index, entry.position): entry for index, part in enumerate(parts) for entry in part.entries}
    writers: dict[Place, list[tuple[int, int]]] = {}
    for (index, position), entry in entries.items():
        leaves = _operands(entry)
        for operand in entry.writes:
            if leaves[operand][1] == "r":
                writers.setdefault((index, leaves[operand][2], leaves[operand][3]), []).append((index, position))
    seen: set[tuple[int, int]] = set()
    waiting = [(loss[0], loss[1]), *writers.get(loss, ())]
    while waiting:
        at = waiting.pop()
        if at in seen or at not in entries:
            continue
        seen.add(at)
        for leaf in _operands(entries[at]):
            if leaf[1] in ("r", "x"):
                place = parts[at[0]].externals[leaf[2]] if leaf[1] == "x" else (at[0], leaf[2], leaf[3])
                waiting += [(place[0], place[1]), *writers.get(place, ())]
    return frozenset(seen)


def _operands(entry: Entry) -> list[tuple[Any, ...]]:
    return [found for found in described(entry.arguments) if found[1] != "f"]


class _Said:
    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _text(entry: Entry) -> str:
    def leaf(found: tuple[Any, ...]) -> Any:
        if found[1] != "f":
            return _Said("tensor")
        return _Said("number") if entry.numbers is None else entry.numbers[found[2]]

    args, kwargs = thaw(entry.arguments, leaf)
    words = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
    of = type(entry.model.module) if entry.model is not None else entry.func
    return f"{getattr(of, '__name__', type(of).__name__)}({', '.join(words)})"


def _shown(value: Any) -> str:
    if isinstance(value, _Said):
        return value.text
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(item)}' for key, item in value.items())}}}"
    return type(value).__name__  # its repr may name a place in memory
