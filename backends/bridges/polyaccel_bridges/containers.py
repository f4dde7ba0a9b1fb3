"""Lists, dicts and sets among the attributes of modules, put back as they were after a forward that only a tracer has seen.

transformers installs hooks in the first forward and notes that in an attribute: without this, the note is taken back, the hooks
stay, and the next capture installs them twice, so that every hidden state is recorded twice.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

_log = logging.getLogger(__name__)
_told: set[str] = set()
_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)
_MANAGED = frozenset({"_parameters", "_buffers"})  # `filled` puts these back itself


@final
class ContainerContents:
    """What the containers reachable from the attributes of `modules` hold now; `restore()` makes them hold that again."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._contents: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        waiting = [
            (f"{type(module).__name__}.{name}", value)
            for module in modules
            for name, value in module.__dict__.items()
            if name not in _MANAGED
        ]
        while waiting:
            name, value = waiting.pop()
            kind = type(value)
            if kind not in (*_MAPPINGS, *_SEQUENCES, set, tuple) or id(value) in seen:
                continue
            seen.add(id(value))
            if kind in _MAPPINGS:
                self._contents.append((name, value, dict(value)))
                waiting.extend((name, inner) for inner in value.values())
            else:
                if kind is not tuple:
                    self._contents.append((name, value, kind(value) if kind is set else list(value)))
                waiting.extend((name, inner) for inner in value)

    def restore(self) -> None:
        """Put back what was added, removed or exchanged; a container that did not change is not touched.

        Tensors that forward put into one exist only inside the program: that they are gone again is said once per attribute.
        """
        for name, container, before in self._contents:
            if _is_as_before(container, before):
                continue
            if name not in _told and any(
                isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(_plain(container))
            ):
                _told.add(name)
                _log.warning(
                    "forward puts tensors into %s, and a compiled program leaves it as it was: reading it after the call finds nothing"
                    " new. Return them from forward instead.",
                    name,
                )
            container.clear()
            if type(container) in _SEQUENCES:
                container.extend(before)
            else:
                container.update(before)


def _plain(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _is_as_before(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(before, set):
        return {id(item) for item in container} == {id(item) for item in before}
    if isinstance(before, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(key is old_key and value is old for (key, value), (old_key, old) in pairs)
    return all(item is old for item, old in zip(container, before, strict=True))
