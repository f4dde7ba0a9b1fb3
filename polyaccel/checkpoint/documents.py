"""JSON files that notice any change to their bytes: the first line is a checksum of all that follows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 2**30
_FIRST_LINE = re.compile(rb'\{"checksum": "xxh3_128:([0-9a-f]{32})",\n')
_LONGEST_FIRST_LINE = 64


class Malformed(ValueError):
    """A file says something that no checkpoint says."""


def encode(fields: Mapping[str, Any]) -> bytes:
    """The fields as strict JSON, one line each, behind the line with their checksum."""
    import xxhash

    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items())
    body = (",\n".join(lines) + "\n}\n").encode("ascii")
    return b'{"checksum": "xxh3_128:' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n' + body


def decode(data: bytes) -> dict[str, Any]:
    """The fields that were encoded. Raises Malformed for a changed byte, and for JSON that `encode` does not write."""
    import xxhash

    first = _FIRST_LINE.match(data[:_LONGEST_FIRST_LINE])
    if first is None:
        raise Malformed("its first line is not a checksum")
    body = data[first.end() :]
    if xxhash.xxh3_128_hexdigest(body).encode() != first[1]:
        raise Malformed("its checksum is not that of its text")
    return mapping(strict_json(b"{" + body), "the file")


def strict_json(text: bytes) -> Any:
    """JSON without duplicate names, NaN, or nesting that exhausts the stack. Raises Malformed."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refused)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except Malformed:
        raise
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise Malformed(f"it is no JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Malformed(f"the name {twice!r:.80} stands there twice")
    return found


def _refused(constant: str) -> Any:
    raise Malformed(f"{constant} is no JSON")


# What a field has to be. Each returns its argument, typed, or raises Malformed with the place.


def mapping(value: Any, where: str) -> dict[str, Any]:
    """An object of JSON."""
    if type(value) is not dict:
        raise Malformed(f"{where} is no object")
    return value


def record(value: Any, where: str, names: set[str]) -> dict[str, Any]:
    """An object with exactly these names."""
    found = mapping(value, where)
    if found.keys() != names:
        raise Malformed(f"{where} has the names {sorted(found)!s:.200}, not {sorted(names)}")
    return found


def sequence(value: Any, where: str) -> list[Any]:
    """An array of JSON."""
    if type(value) is not list:
        raise Malformed(f"{where} is no list")
    return value


def text(value: Any, where: str) -> str:
    """A text."""
    if type(value) is not str:
        raise Malformed(f"{where} is no text")
    return value


def whole(value: Any, where: str) -> int:
    """A whole number from 0 to below 2**62: sizes, offsets and counts."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise Malformed(f"{where} is {value!r:.40}, which cannot be a size or a place")
    return value


def extents(value: Any, where: str) -> tuple[int, ...]:
    """A shape or an offset."""
    found = tuple(whole(item, where) for item in sequence(value, where))
    if len(found) > 64:
        raise Malformed(f"{where} has {len(found)} dims")
    return found
