"""Python values as bytes between processes, without pickle: what arrives can hold data, never code.

Plain values (None, bool, int, float, str, bytes, list, tuple, set, dict) and arrays are encoded; anything else is refused by
name. Torch tensors come back as torch tensors in host memory, other arrays as numpy's. JSON carries the structure; bytes and
arrays follow it as raw blocks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from polyaccel.errors import UnsupportedError


def encode(value: Any) -> bytes:
    """`value` as bytes that `decode` turns back into an equal value.

    Raises UnsupportedError naming the first type that cannot be sent.
    """
    blocks: list[bytes] = []
    header = json.dumps(_pack(value, blocks), separators=(",", ":")).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *blocks])


def decode(data: bytes) -> Any:
    """The value that was encoded. Raises ValueError on bytes that `encode` did not make."""
    size = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + size])
    value, rest = _unpack(tree, memoryview(data)[8 + size :])
    if len(rest):
        raise ValueError(f"{len(rest)} bytes after the end of the message")
    return value


def _pack(value: Any, blocks: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    kind = type(value)
    if kind is int:
        return value
    if kind is float:
        return {"float": value.hex()}  # hex is exact and carries inf and nan
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [_pack(item, blocks) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(name, blocks), _pack(item, blocks)] for name, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        blocks.append(bytes(value))
        return {"bytes": len(value)}
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _pack_array(value, blocks)
    raise UnsupportedError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be sent between processes: {value!r:.80}",
        "send numbers, strings, bytes, arrays, or lists, tuples, sets and dicts of them",
    )


def _pack_array(value: Any, blocks: list[bytes]) -> Any:
    import numpy as np

    torch: Any = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(value, torch.Tensor)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if is_tensor and value.dtype == torch.bfloat16:  # which numpy lacks
        blocks.append(value.contiguous().view(torch.int16).numpy().tobytes())
        return {"tensor": ["bfloat16", list(value.shape), 2 * value.numel()]}
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise UnsupportedError(
            "an array of Python objects cannot be sent between processes", "send a list of plain values"
        )
    array = np.ascontiguousarray(array).reshape(array.shape)
    blocks.append(array.tobytes())
    return {"tensor" if is_tensor else "array": [array.dtype.name, list(array.shape), array.nbytes]}


def _unpack(tree: Any, rest: memoryview) -> tuple[Any, memoryview]:
    if not isinstance(tree, dict):
        return tree, rest
    ((kind, content),) = tree.items()
    if kind == "float":
        return float.fromhex(content), rest
    if kind == "bytes":
        return bytes(rest[:content]), rest[content:]
    if kind in ("array", "tensor"):
        import numpy as np

        dtype, shape, size = content
        if kind == "tensor" and "torch" in sys.modules:
            return _tensor(dtype, shape, rest[:size]), rest[size:]
        if dtype not in np.sctypeDict:
            import ml_dtypes

            dtype = getattr(ml_dtypes, dtype)  # bfloat16 and the float8 family are no numpy dtypes
        return np.frombuffer(rest[:size], dtype=dtype).reshape(shape).copy(), rest[size:]
    items: list[Any] = []
    for item in content:
        if kind == "dict":
            name, rest = _unpack(item[0], rest)
            entry, rest = _unpack(item[1], rest)
            items.append((name, entry))
        else:
            entry, rest = _unpack(item, rest)
            items.append(entry)
    kinds: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}
    return kinds[kind](items), rest


def _tensor(dtype: str, shape: list[int], data: memoryview) -> Any:
    torch = sys.modules["torch"]
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)) if len(data) else torch.empty(0)
    return flat.to(getattr(torch, dtype)).reshape(shape)
