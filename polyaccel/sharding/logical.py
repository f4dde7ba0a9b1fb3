"""Flax partitioning metadata: names that a module gives its dims, as axes of the mesh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polyaccel.sharding.rules import CUTTING_AXES, Spec

# What flax's own examples and t5x call their dims, and the mesh axis that these names stand for there.
LOGICAL_AXES: Mapping[str, str | None] = {
    **{name: name for name in CUTTING_AXES},
    **dict.fromkeys(("model", "mp", "mlp", "heads", "vocab", "joined_kv", "qkv"), "tensor"),
    "embed": "fsdp",
    **dict.fromkeys(("kv", "layers", "stack", "data", "replica", "batch", "sequence"), None),
}


def axes_of_names(names: Sequence[Any], rules: Iterable[tuple[str, Any]] = ()) -> tuple[Spec, tuple[str, ...]]:
    """(per dim the mesh axis, or None; names that stand for no axis).

    `rules`: logical name -> axis as the module gives them; the first that names it counts, before the common names. An axis cuts the
    first dim that asks for it. A dim that names several axes is cut by the first of them that cuts parameters.
    """
    given: dict[str, Any] = {}
    for name, axis in rules:
        given.setdefault(name, axis)
    spec: list[str | None] = []
    unknown: list[str] = []
    for entry in names:
        chosen: str | None = None
        for name in _flat(entry):
            for target in _flat(given[name]) if name in given else [name]:
                if target not in LOGICAL_AXES:
                    unknown.append(target)
                elif chosen is None and LOGICAL_AXES[target] not in (None, *spec):
                    chosen = LOGICAL_AXES[target]
        spec.append(chosen)
    return tuple(spec), tuple(unknown)


def _flat(entry: Any) -> list[str]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, str) else [str(name) for name in entry if name is not None]
