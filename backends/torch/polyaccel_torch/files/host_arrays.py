"""Tensors as stored arrays and back. numpy has no bfloat16 and no float8: such data travels as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from polyaccel.errors import CheckpointError
from polyaccel.stored import StoredArray

_BITS = {1: torch.uint8, 2: torch.uint16}


def dtype_of(name: str, where: str) -> torch.dtype:
    """torch's dtype of that numpy name. Raises CheckpointError, saying where it stands, for one that torch has not."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{where} has dtype {name}, which torch has not", "leave it out of the conversion")
    return dtype


def needs_bits(dtype: torch.dtype) -> bool:
    """Whether numpy alone has no type for it."""
    return dtype == torch.bfloat16 or str(dtype).startswith("torch.float8")


def store(tensor: torch.Tensor) -> StoredArray:
    """A stored array that reads this tensor, which may itself be a view of a file."""
    return StoredArray(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), lambda: to_host(tensor))


def to_host(tensor: torch.Tensor) -> Any:
    """The values as a numpy array, without a copy where the tensor is dense and on the host."""
    host = tensor.detach().cpu().contiguous()
    return (host.view(_BITS[host.element_size()]) if needs_bits(host.dtype) else host).numpy()


def load(array: StoredArray, where: str) -> torch.Tensor:
    """The tensor of a stored array. Raises CheckpointError for a dtype that torch has not."""
    dtype = dtype_of(array.dtype, where)
    data = np.asarray(array.read())
    if needs_bits(dtype):
        data = data.view(np.uint8 if data.dtype.itemsize == 1 else np.uint16)
    if not data.flags.writeable or not data.flags.c_contiguous:
        data = np.array(data, order="C")  # torch warns of arrays that it must not write to
    tensor = torch.from_numpy(data.reshape(array.shape))
    return tensor.view(dtype) if needs_bits(dtype) else tensor
