"""Tensors and arrays across the border: torch to numpy without a copy, jax and numpy to torch with memory of torch's own."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .programs import numpy_dtype

_TORCH_DTYPES: dict[str, torch.dtype] = {
    numpy_dtype(dtype).name: dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
# numpy knows these through ml_dtypes alone and torch does not take them from numpy: the same bits travel as integers.
_AS_INTEGER: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, np.int16),
    torch.float8_e4m3fn: (torch.int8, np.int8),
    torch.float8_e5m2: (torch.int8, np.int8),
}

PLACED = "_polyaccel_placed"  # attribute of a host tensor: (its array on the device, the tensor's version at that time)


class Fetches(Protocol):
    """What fetching needs of an engine."""

    def to_host(self, array: Any) -> Any: ...

    def state_to_host(self, array: Any, what: str) -> Any: ...


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a numpy dtype name (`bfloat16` included)."""
    return _TORCH_DTYPES[name]


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The values of a CPU tensor as numpy, sharing its memory where torch allows it."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    words = _AS_INTEGER.get(plain.dtype)
    if words is None:
        return plain.numpy()
    return plain.contiguous().view(words[0]).numpy().view(numpy_dtype(tensor.dtype))


def to_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A CPU tensor with these values and memory of its own."""
    dtype = torch_dtype(array.dtype.name)
    words = _AS_INTEGER.get(dtype)
    owned = np.array(array)
    if words is None:
        return torch.from_numpy(owned)
    return torch.from_numpy(owned.view(words[1])).view(dtype)


def fetch(engine: Fetches, array: Any) -> torch.Tensor:
    """This process's part of a device array as a CPU tensor with memory of its own; waits for the device."""
    return to_tensor(np.asarray(engine.to_host(array)))


def fetch_state(engine: Fetches, array: Any, what: str) -> torch.Tensor:
    """The whole of a parameter or gradient as a CPU tensor with memory of its own; waits for the device.

    Raises UnsupportedError where other processes hold pieces of it; `what` names it.
    """
    return to_tensor(np.asarray(engine.state_to_host(array, what)))


def placed_array(tensor: torch.Tensor) -> Any | None:
    """The device array that a batch tensor carries, or None when it has none or was written to since."""
    placed = tensor.__dict__.get(PLACED)
    if placed is None or tensor._version != placed[1]:
        return None
    return placed[0]


def carry(tensor: torch.Tensor, array: Any) -> None:
    """Let `tensor` carry its values' array on the device; it counts until the tensor is written to."""
    if not tensor.is_inference():  # those have no version to tell a write by
        setattr(tensor, PLACED, (array, tensor._version))
