"""Which bits an element has in a file: the seam's dtype names, the names of safetensors, and numpy's view of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Stored:
    """How a dtype is written: safetensors' name for it, and the numpy dtype (little endian) that holds its bits."""

    name: str
    numpy: str
    size: int


_SAFETENSORS = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "complex64": ("C64", "<c8"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "|i1"),
    "uint64": ("U64", "<u8"),
    "uint32": ("U32", "<u4"),
    "uint16": ("U16", "<u2"),
    "uint8": ("U8", "|u1"),
    "bool": ("BOOL", "|b1"),
    # numpy has none of these: their bits
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "|u1"),
    "float8_e5m2": ("F8_E5M2", "|u1"),
}
# safetensors has no name for these; their bits are a file's U8, and the manifest says what they are.
_BYTES = (
    *("float8_e4m3", "float8_e3m4", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float8_e8m0fnu"),
    *("int4", "uint4", "int2", "uint2"),  # one byte per element, as ml_dtypes holds them
)
STORED: dict[str, Stored] = {
    name: Stored(stored, numpy, int(numpy[2:])) for name, (stored, numpy) in _SAFETENSORS.items()
} | {name: Stored("U8", "|u1", 1) for name in _BYTES}
SIZES = {stored.name: stored.size for stored in STORED.values()}


def to_bytes(shard: Shard, group: str) -> memoryview:
    """The piece's elements in row-major order, without a copy where they lie so already.

    Raises CheckpointError where the dtype cannot be stored, or the data is not of the dtype that the shard claims.
    """
    import numpy as np

    stored = STORED.get(shard.dtype)
    if stored is None:
        raise CheckpointError(
            f"{group}: {shard.name!r} has dtype {shard.dtype}, which checkpoints cannot hold",
            "convert it to a dtype that they can: " + ", ".join(_SAFETENSORS),
        )
    array = np.asarray(shard.data)
    if array.dtype.name != shard.dtype and not (stored.numpy[1] == "u" and array.dtype == np.dtype(stored.numpy)):
        raise CheckpointError(
            f"{group}: {shard.name!r} is said to be {shard.dtype}, and its data is {array.dtype.name}",
            "this is a defect of the engine or object that gave it",
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def empty(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array to read a piece into: of the dtype, or of its bits where numpy has no such dtype."""
    import numpy as np

    return np.empty(shape, np.dtype(STORED[dtype].numpy))
