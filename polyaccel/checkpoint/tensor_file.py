"""Files of the safetensors format: laid out for a writer that streams, and read by a parser that believes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from polyaccel.checkpoint.documents import Malformed, extents, mapping, record, sequence, strict_json, text, whole
from polyaccel.checkpoint.dtypes import SIZES, STORED
from polyaccel.checkpoint.storage import Readable
from polyaccel.errors import CheckpointError

_MAX_HEADER = 100_000_000  # that of the safetensors library
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array to be stored: its key in the file, dtype name of the seam, shape and bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Span:
    """Where a stored array lies in its file, from `start` to before `end`; `dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def layout(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of the file, in order, none of them copied. Wide elements come first, so that every array is aligned to its own."""
    ordered = sorted(tensors, key=lambda tensor: (-STORED[tensor.dtype].size, tensor.key))
    header: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.data.nbytes
        facts = {"dtype": STORED[tensor.dtype].name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.key] = facts
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"the names and shapes of {len(ordered)} arrays need a header of {len(text)} bytes; the format allows {_MAX_HEADER}",
            "put the arrays into several groups",
        )
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        yield tensor.data


def read_header(file: Readable) -> dict[str, Span]:
    """Every stored array by its key. Raises Malformed unless the arrays fill the file without gap or overlap."""
    if file.size < 8:
        raise Malformed(f"it has {file.size} bytes, fewer than a header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(_MAX_HEADER, file.size - 8):
        raise Malformed(f"its header claims {length} bytes of {file.size}")
    fields = mapping(strict_json(file.read(8, length)), "the header")
    fields.pop(METADATA, None)
    spans = {key: _span(value, f"{key!r:.200}", 8 + length) for key, value in fields.items()}
    end = 8 + length
    for key, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != end:
            raise Malformed(f"{key!r:.200} begins at byte {span.start}, and what lies before it ends at {end}")
        end = span.end
    if end != file.size:
        raise Malformed(f"its arrays end at byte {end} of {file.size}")
    return spans


def _span(value: object, where: str, base: int) -> Span:
    fields = record(value, where, {"dtype", "shape", "data_offsets"})
    dtype, shape = text(fields["dtype"], where), extents(fields["shape"], where)
    offsets = sequence(fields["data_offsets"], where)
    if len(offsets) != 2 or dtype not in SIZES:
        raise Malformed(f"{where} has dtype {dtype:.40} and offsets {offsets!s:.80}")
    start, end = (whole(offset, where) for offset in offsets)
    if end - start != prod(shape) * SIZES[dtype]:
        raise Malformed(f"{where} of shape {list(shape)!s:.80} and dtype {dtype} cannot have {end - start} bytes")
    return Span(dtype, shape, base + start, base + end)
