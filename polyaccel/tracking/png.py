"""Images as PNG files: pictures of PIL, paths, and arrays of numbers, encoded with the standard library alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from polyaccel.errors import TrackerError

_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG's colour type: gray, gray + alpha, RGB, RGBA


def take_image(image: Any) -> Any:
    """What must be copied before the script goes on: the values of an array. Paths and PIL images stay as they are."""
    if isinstance(image, (str, Path)) or hasattr(image, "save"):
        return image
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    return image.__array__().copy() if hasattr(image, "__array__") else image


def to_png(image: Any) -> bytes:
    """An image as a PNG file.

    Arrays are (height, width), (height, width, channels) or (channels, height, width) with 1 to 4 channels; whole numbers are taken
    as 0 to 255, floating ones as 0 to 1 (outside values are clipped). Raises TrackerError for anything that is no image.
    """
    if isinstance(image, (str, Path)):
        data = Path(image).read_bytes()
        if not data.startswith(b"\x89PNG"):
            raise TrackerError(f"image {str(image)!r} is no PNG file", "pass a PNG file, a PIL image or an array")
        return data
    if hasattr(image, "save"):
        import io

        stream = io.BytesIO()
        image.save(stream, format="PNG")
        return stream.getvalue()
    return _encode(_to_bytes(image))


def _to_bytes(image: Any) -> Any:
    import numpy as np

    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in _COLOURS and array.shape[-1] not in _COLOURS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in _COLOURS or array.dtype.kind not in "buif" or not array.size:
        raise TrackerError(
            f"an image of shape {np.shape(image)} and dtype {array.dtype} cannot be drawn",
            "log numbers of shape (height, width), (height, width, channels) or (channels, height, width), 1 to 4 channels",
        )
    if array.dtype.kind in "fb":
        array = np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255 + 0.5
    return np.ascontiguousarray(array.clip(0, 255).astype(np.uint8))  # (height, width, channels)


def _encode(array: Any) -> bytes:
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)  # each row says that it is not filtered
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
