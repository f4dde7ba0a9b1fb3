"""Where the pieces of an array lie, and whether together they are the array: every element once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape
_MAX_TANGLED = 256  # boxes that no straight cut separates, compared pair by pair


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a global array, stored under `key` in a file of the checkpoint."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def why_not_whole(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What keeps these boxes from being exactly the array, None where they are.

    Meshes cut arrays by straight cuts, so boxes are separated by such cuts again; the work is bounded for boxes that nobody's mesh made.
    """
    for offset, size in boxes:
        if not len(offset) == len(size) == len(shape):
            return f"a piece at {list(offset)} of shape {list(size)} has another number of dims than {list(shape)}"
        if any(start < 0 or start + length > whole for start, length, whole in zip(offset, size, shape)):
            return f"a piece at {list(offset)} of shape {list(size)} reaches outside {list(shape)}"
    there, wanted = sum(prod(size) for _, size in boxes), prod(shape)
    if there < wanted:
        return f"{wanted - there} of {wanted} elements are missing"
    if there > wanted or not _are_apart([box for box in boxes if prod(box[1])], len(shape)):
        return "pieces overlap"
    return None


def _are_apart(boxes: list[Box], num_dims: int) -> bool:
    groups, budget = [boxes], 200 * len(boxes) + 10_000
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        budget -= len(group)
        if budget < 0:
            return False
        parts = _cut(group, num_dims)
        if len(parts) > 1:
            groups.extend(parts)
        elif len(group) > _MAX_TANGLED or not _no_pair_meets(group):
            return False
    return True


def _cut(boxes: list[Box], num_dims: int) -> list[list[Box]]:
    """The boxes in groups that straight cuts across one dim separate."""
    for dim in range(num_dims):
        groups: list[list[Box]] = []
        end = -1
        for box in sorted(boxes, key=lambda box: box[0][dim]):
            if box[0][dim] >= end:
                groups.append([])
            groups[-1].append(box)
            end = max(end, box[0][dim] + box[1][dim])
        if len(groups) > 1:
            return groups
    return [boxes]


def _no_pair_meets(boxes: list[Box]) -> bool:
    return not any(
        all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other))
        for index, one in enumerate(boxes)
        for other in boxes[:index]
    )
