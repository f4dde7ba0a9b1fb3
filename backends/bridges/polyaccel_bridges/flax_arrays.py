"""Memory that torch and jax share: views of torch tensors for jitted programs, and tensors of what the programs gave.

torch owns what trains and writes it in place, jax runs ahead of its caller. So nothing of torch's is ever donated, no program
runs while its caller goes on (`finish`), and user code gets copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from polyaccel.errors import UnsupportedError

from .exchange import to_numpy


def jax_device(device: torch.device) -> jax.Device:
    """The jax device of the same memory. Raises UnsupportedError where jax has none."""
    if device.type == "cpu":
        return jax.local_devices(backend="cpu")[0]
    if device.type == "cuda":
        try:
            found = jax.local_devices(backend="cuda")
        except RuntimeError as error:
            raise UnsupportedError(
                f"this flax model would train on {device}, and the installed jax has no CUDA devices",
                "install jax for CUDA (pip install 'jax[cuda12]'), or use cpu=True",
            ) from error
        return next(one for one in found if one.local_hardware_id == device.index)
    raise UnsupportedError(
        f"a flax model cannot run on torch's {device.type} device: jax has no memory in common with it",
        "use cpu=True, or backend='jax'",
    )


class View:
    """A tensor as a jax array of the same memory, made again only when the memory moves. For programs only, never user code."""

    __slots__ = ("_array", "_pointer", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._array: Any = None
        self._pointer = -1

    def array(self) -> jax.Array:
        """The values of now, until torch writes to the tensor."""
        if self.tensor.data_ptr() != self._pointer:
            self._array = array = jax.dlpack.from_dlpack(self.tensor.detach())
            # Memory that XLA cannot take as it is (alignment) was copied: then every look needs a copy.
            is_shared = array.unsafe_buffer_pointer() == self.tensor.data_ptr()
            self._pointer = self.tensor.data_ptr() if is_shared else -1
        return self._array


def as_argument(tensor: torch.Tensor) -> Any:
    """A tensor as an argument of one jitted call: a view that costs little to make."""
    # jit takes numpy views at a tenth of the price of DLPack's, without a copy where the memory is aligned.
    return to_numpy(tensor) if tensor.device.type == "cpu" else jax.dlpack.from_dlpack(tensor.detach())


def to_jax(tensor: torch.Tensor, device: jax.Device) -> jax.Array:
    """An array of its own with the tensor's values; 64-bit types become 32-bit ones unless jax is told to keep them."""
    if tensor.device.type != "cpu":
        return finish(jax.numpy.array(jax.dlpack.from_dlpack(tensor.detach().contiguous()), copy=True))
    return finish(jax.device_put(to_numpy(tensor), device, may_alias=False))


def to_torch(array: jax.Array) -> torch.Tensor:
    """A tensor of the array's memory, which torch must not write to unless nobody holds the array; waits for the array."""
    # On CPU the capsule is enough, and half the price: there is no stream to agree on.
    return torch.from_dlpack(array.__dlpack__() if array.platform() == "cpu" else array)


def place(leaves: Sequence[Any], device: jax.Device) -> list[jax.Array]:
    """Arrays and numbers of user code as arrays on the device; those that are there already stay as they are."""
    placed = list(leaves)
    waiting = [i for i, leaf in enumerate(placed) if not (isinstance(leaf, jax.Array) and leaf.devices() == {device})]
    if waiting:
        # Loaders reuse their memory: an aliased batch would change under the step.
        arrays = jax.device_put([placed[i] for i in waiting], device, may_alias=False)
        for i, array in zip(waiting, arrays, strict=True):
            placed[i] = array
    return placed


def is_key(value: Any) -> bool:
    """Whether an array holds typed random keys, which neither numpy nor torch can."""
    return isinstance(value, jax.Array) and bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def words(value: Any) -> Any:
    """Random keys as the unsigned integers that they are made of; anything else as it is."""
    return jax.random.key_data(value) if is_key(value) else value


def like(tensor: torch.Tensor, current: jax.Array) -> jax.Array:
    """A tensor's values in the dtype of `current`: words become random keys where that holds keys."""
    array = to_numpy(tensor.cpu())
    if is_key(current):
        return jax.random.wrap_key_data(jax.numpy.asarray(array, np.uint32), impl=jax.random.key_impl(current))
    return jax.numpy.asarray(array, current.dtype)


def host(value: Any) -> np.ndarray[Any, Any]:
    """An array as numpy; waits for the device."""
    return np.asarray(value)


def fence(device: torch.device) -> None:
    """Wait for torch's work on this device, so that jax reads what it wrote. CPU work has finished already."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def finish(values: Any) -> Any:
    """Wait for jax's work on these arrays, so that torch may write to what was read; returns them."""
    return jax.block_until_ready(values)
