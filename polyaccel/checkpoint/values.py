"""Plain values as JSON and back, exactly: floats by their shortest digits, what JSON cannot say under a tag such as `{"$tuple": [...]}`."""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from typing import Any

from polyaccel.errors import CheckpointError

MAX_DEPTH = 100  # of nested containers; real state is below 10
_JSON_INT = 2**63  # larger ones are written in hex: Python limits the length of decimal ones


def pack(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as a JSON value from which `unpack` makes an equal one.

    None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict and Counter; numpy's scalars come back as Python's, an
    OrderedDict as a dict. Raises CheckpointError naming `where` (`shared.scheduler.milestones`) for anything else: what comes out of a
    checkpoint is data, never code.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where:.200} is nested more than {MAX_DEPTH} deep", "save something flatter")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_JSON_INT < value < _JSON_INT else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if kind is list:
        return [pack(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if kind in (tuple, set, frozenset):
        return {f"${kind.__name__}": [pack(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]}
    if kind in (dict, OrderedDict, Counter):
        if kind is not Counter and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: pack(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        tag = "$counter" if kind is Counter else "$dict"
        pairs = value.items()
        return {tag: [[pack(k, where, depth + 1), pack(v, f"{where}[{k!r}]", depth + 1)] for k, v in pairs]}
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0 and kind.__name__ != "ndarray":
        plain = value.item()
        if type(plain) in (bool, int, float, str, bytes):
            return pack(plain, where, depth)
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which is neither a plain value nor an array: {value!r:.80}",
        "keep numbers, strings, bytes, arrays, or lists, tuples, sets and dicts of them in what is saved",
    )


def unpack(tree: Any, depth: int = 0) -> Any:
    """The value that was packed. Raises ValueError where `pack` cannot have made it."""
    if depth > 2 * MAX_DEPTH + 2:
        raise ValueError(f"values are nested more than {MAX_DEPTH} deep")
    if isinstance(tree, list):
        return [unpack(item, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next((key for key in tree if key.startswith("$")), None)
    if tag is None:
        return {key: unpack(item, depth + 1) for key, item in tree.items()}
    if len(tree) != 1:
        raise ValueError(f"{tag} stands beside other names")
    return _tagged(tag, tree[tag], depth + 1)


def _tagged(tag: str, content: Any, depth: int) -> Any:
    if tag in ("$int", "$float", "$bytes"):
        if not isinstance(content, str):
            raise ValueError(f"{tag} of {content!r:.40}")
        if tag == "$bytes":
            return base64.b64decode(content, validate=True)
        if tag == "$int":
            return int(content, 16)
        if content not in ("nan", "inf", "-inf"):
            raise ValueError(f"{tag} of {content!r:.40}")
        return float(content)
    if tag not in ("$tuple", "$set", "$frozenset", "$dict", "$counter") or not isinstance(content, list):
        raise ValueError(f"{tag:.40} means nothing")
    items = [unpack(item, depth) for item in content]
    try:
        if tag == "$tuple":
            return tuple(items)
        if tag in ("$set", "$frozenset"):
            return set(items) if tag == "$set" else frozenset(items)
        if not all(type(item) is list and len(item) == 2 for item in items):
            raise ValueError(f"{tag} of something else than pairs")
        pairs = dict(items)
    except TypeError:  # a list as a key
        raise ValueError(f"{tag} with a key that cannot be one") from None
    if len(pairs) != len(items):
        raise ValueError(f"{tag} has a key twice")
    if tag == "$dict":
        return pairs
    return Counter(pairs)
