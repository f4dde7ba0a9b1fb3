"""Finds the newest checkpoint that is whole."""

from __future__ import annotations

from polyaccel.checkpoint import names
from polyaccel.checkpoint.read import Saved, open_checkpoint
from polyaccel.checkpoint.storage import Location, explained, open_folder
from polyaccel.errors import CheckpointError


def numbered(folder: Location) -> list[str]:
    """Names of the automatically named checkpoints that are there, whole or not, the newest first: by number, not by text."""
    place = open_folder(folder)
    with explained(f"{place.url} cannot be read"):
        there = place.entries()
    return sorted((name for name in there if names.checkpoint_number(name) is not None), key=_number, reverse=True)


def next_number(folder: Location) -> int:
    """A number above that of every checkpoint that is there, whole or not."""
    return max(map(_number, numbered(folder)), default=-1) + 1


def newest_checkpoint(folder: Location, *, verify: bool = True) -> tuple[Saved | None, list[tuple[str, str]]]:
    """The automatically named checkpoint of the highest number that opens, and which ones of higher numbers were passed over, and why.

    (None, ...) where none is whole, or none is there. Links are passed over: they may lead anywhere.
    """
    place = open_folder(folder)
    with explained(f"{place.url} cannot be read"):
        kinds = place.entries()
    passed_over: list[tuple[str, str]] = []
    for name in numbered(folder):
        checkpoint = place.child(name)
        if kinds.get(name) != "folder":
            passed_over.append((checkpoint.url, f"it is a {kinds.get(name, 'name that has just gone')}"))
            continue
        try:
            return open_checkpoint(checkpoint.url, verify=verify), passed_over
        except CheckpointError as error:
            passed_over.append((checkpoint.url, error.message))
    return None, passed_over


def _number(name: str) -> int:
    number = names.checkpoint_number(name)
    return -1 if number is None else number
