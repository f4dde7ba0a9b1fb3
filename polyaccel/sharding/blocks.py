"""The blocks of a model, read from the names of its parameters: numbered parts of one kind, such as `h.0`, `layers.11` or `Block_3`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"^(.*?)_?(\d+)$")


def blocks_of_names(names: Iterable[str]) -> tuple[str, ...]:
    """Dotted paths of the outermost numbered siblings that have parts of their own, in the order of the names; at least two siblings.

    Items of lists (`h.0`) count; where there are none, siblings whose names end in a number do (`Block_0`).
    """
    paths = [tuple(name.split(".")) for name in names]
    return _blocks(paths, lists_only=True) or _blocks(paths, lists_only=False)


def _blocks(paths: list[tuple[str, ...]], *, lists_only: bool) -> tuple[str, ...]:
    groups: dict[tuple[tuple[str, ...], str], dict[tuple[str, ...], None]] = {}
    for path in paths:
        for depth in range(len(path) - 2):  # a block has parts, and these have parameters
            found = _NUMBERED.match(path[depth])
            if found is None or (lists_only and found[1]):
                continue
            groups.setdefault((path[:depth], found[1]), {})[path[: depth + 1]] = None
    blocks = [block for group in groups.values() if len(group) > 1 for block in group]
    outermost = [
        block for block in blocks if not any(block[: len(other)] == other for other in blocks if other != block)
    ]
    return tuple(".".join(block) for block in outermost)
