"""A flax model as torch has it: an nn.Module that owns the values, and the handle through which the flax dialect sees them."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from polyaccel.errors import PrepareError, UnsupportedError

from .exchange import to_tensor
from .flax_arrays import View, finish, host, is_key, like, place, to_torch, words

if TYPE_CHECKING:
    from .flax_programs import FlaxRuntime


class HeldModel:
    """The engine model of the flax dialect (see protocols.ProgramModel), with its values in the memory of torch tensors.

    Parameters are nn.Parameters, statistics torch buffers; random keys and unsigned counters stay jax arrays, `beside` them:
    torch cannot compute with those, and they belong to their process.
    """

    def __init__(self, runtime: FlaxRuntime, name: str, source: Any) -> None:
        params, buffers = source.read()
        device = runtime.engine.device
        self.engine: Any = runtime
        self.name = name
        self.source = source
        self.names: tuple[str, ...] = tuple(params)
        self.buffer_names: tuple[str, ...] = tuple(buffers)
        self.positions = {key: index for index, key in enumerate(self.names)}
        self.tensors: dict[str, torch.Tensor] = {key: _parameter(value, device) for key, value in params.items()}
        self.beside: dict[str, jax.Array] = {}
        # Compiled, of the calls whose first model this is, and those calls; they go when it goes.
        self.programs: dict[Hashable, Any] = {}
        self.known_calls: dict[Any, Any] = {}
        self.is_replicated = False  # whether other processes expect a gradient of every parameter (DDP)
        self.is_written_by_torch = (
            False  # whether user code has the torch parameters: an optimizer of torch's may write
        )
        self._handle: weakref.ref[nn.Module] | None = None
        self._num_changes = 0
        for key, value in buffers.items():
            if _fits_torch(value):
                self.tensors[key] = _owned(value, device)
            else:
                self.beside[key] = _copy(value, runtime.device)
        self._views = {key: View(tensor) for key, tensor in self.tensors.items()}

    # -- what the dialect asks -------------------------------------------------------------------------------------------

    @property
    def params(self) -> Mapping[str, jax.Array]:
        """The parameters by name, each a copy of what it is when it is asked for."""
        return _Copies(self, self.names)

    @property
    def buffers(self) -> Mapping[str, jax.Array]:
        """The buffers by name, each a copy of what it is when it is asked for."""
        return _Copies(self, self.buffer_names)

    buffer_arrays = buffers

    @property
    def version(self) -> int:
        """Another number after every write, whoever wrote: torch counts those to its tensors, but not those of its fused optimizers."""
        if self.is_written_by_torch:
            self._num_changes += 1
        return self._num_changes + sum([tensor._version for tensor in self.tensors.values()])

    def assign(self, values: Mapping[str, Any]) -> None:
        """Replace parameters and buffers by arrays of the same shapes: copied, placed, cast to the dtype they have."""
        known: dict[str, Any] = {**self.tensors, **self.beside}
        for name, value in values.items():
            if name not in known:
                raise PrepareError(f"the model has no parameter or buffer {name!r}", f"it has: {', '.join(known)}")
            if tuple(np.shape(value)) != tuple(known[name].shape):
                raise PrepareError(
                    f"{name} has shape {tuple(known[name].shape)}, and the new value has shape {tuple(np.shape(value))}",
                    "give a value of the same shape",
                )
        with torch.no_grad():
            for name, value in values.items():
                if name in self.tensors:
                    self.tensors[name].copy_(to_tensor(host(value)))
                else:
                    new = value if is_key(value) else jnp.asarray(value, self.beside[name].dtype)
                    self.beside[name] = _copy(new, self.engine.device)
        self._num_changes += 1

    def move_to_params(self, names: Iterable[str]) -> None:
        """Refused: DistributedDataParallel and the engine knew the parameters before the optimizer came."""
        raise UnsupportedError(
            f"the optimizer's wrt filter selects {', '.join(names)}, which are no nnx.Param",
            "make them nnx.Param, or use backend='jax', which trains variables of every kind",
        )

    # -- what programs ask -----------------------------------------------------------------------------------------------

    def leaves(self, names: Sequence[str]) -> list[jax.Array]:
        """Parameters or buffers as arrays of torch's own memory: valid until torch writes, never to be donated or kept."""
        beside, views = self.beside, self._views
        return [beside[name] if name in beside else views[name].array() for name in names]

    def write(self, values: Mapping[str, jax.Array]) -> None:
        """Take over what a finished program computed, in place."""
        written = [name for name in values if name not in self.beside]
        with torch.no_grad():
            if written:
                torch._foreach_copy_([self.tensors[n] for n in written], [to_torch(values[n]) for n in written])
        kept = {name: value for name, value in values.items() if name in self.beside}
        if kept:
            self.beside.update(kept)
            self._num_changes += 1

    def read_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """What is beside torch's tensors, copied to the host: random keys as their words."""
        return {name: np.array(host(words(value))) for name, value in self.beside.items()}

    def write_arrays(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `read_arrays` gave, here or in another process, as tensors."""
        self.beside.update(
            {name: _copy(like(tensor, self.beside[name]), self.engine.device) for name, tensor in tensors.items()}
        )
        self._num_changes += 1

    # -- its place in torch ----------------------------------------------------------------------------------------------

    @property
    def handle(self) -> nn.Module:
        """What the engine made of the module: itself, or DistributedDataParallel around it."""
        found = None if self._handle is None else self._handle()
        if found is None:
            raise PrepareError(
                f"the engine no longer holds {type(self.source.module).__name__}: its memory was freed",
                "prepare the model again after free_memory",
            )
        return found

    def adopt(self, handle: nn.Module) -> None:
        """Note the engine's handle. Under DistributedDataParallel process 0's random keys count, as its parameters do."""
        self._handle = weakref.ref(handle)
        was_replicated, self.is_replicated = self.is_replicated, not isinstance(handle, FlaxModule)
        if self.is_replicated and not was_replicated:
            collectives = self.engine.engine.collectives
            self.write_arrays(
                {
                    name: collectives.broadcast(torch.from_numpy(array.astype(np.int64)), 0)
                    for name, array in self.read_arrays().items()
                }
            )


class FlaxModule(nn.Module):
    """Parameters and buffers of a flax model under its own dotted names. Calling it computes a loss for torch's autograd.

    A call that uses several models goes through the handles of all of them, one inside the other, so that each one's
    DistributedDataParallel takes part.
    """

    def __init__(self, held: HeldModel) -> None:
        super().__init__()
        self.held = held
        for name, tensor in held.tensors.items():
            *containers, leaf = name.split(".")
            place: nn.Module = self
            for part in containers:
                # Straight into the tables: flax names may be those of attributes that every nn.Module has ("type", "half").
                place = place._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            table: Any = place._parameters if isinstance(tensor, nn.Parameter) else place._buffers
            table[leaf] = tensor

    def forward(self, call: Any, others: Sequence[nn.Module] = ()) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, with a grad_fn, and the auxiliary outputs of a FlaxCall."""
        if others:
            result: tuple[torch.Tensor, list[torch.Tensor]] = others[0](call, others[1:])
            return result
        return self.held.engine.differentiable(call)

    def read_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Random keys and unsigned counters by name, which are part of the state and cannot be torch tensors."""
        return self.held.read_arrays()

    def write_arrays(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace them."""
        self.held.write_arrays(tensors)

    def extra_repr(self) -> str:
        """The flax class."""
        return type(self.held.source.module).__name__


class _Copies(Mapping[str, jax.Array]):
    """Named values, copied one by one when they are asked for: torch writes to the originals in place."""

    def __init__(self, held: HeldModel, names: tuple[str, ...]) -> None:
        self._held = held
        self._names = dict.fromkeys(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._names:
            raise KeyError(name)
        (array,) = self._held.leaves((name,))
        # Finished before it is handed out: the copy reads memory that torch may write to next.
        return array if name in self._held.beside else finish(jnp.copy(array))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parameter(value: Any, device: torch.device) -> nn.Parameter:
    tensor = _owned(value, device)
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())


def _owned(value: Any, device: torch.device) -> torch.Tensor:
    # Copied into memory of torch's allocator: it is aligned as XLA wants it to be shared, numpy's often is not.
    return to_tensor(host(value)).to(device, copy=True)


def _fits_torch(value: Any) -> bool:
    if is_key(value):
        return False
    kind = np.dtype(value.dtype)
    return kind.kind in "bi" or kind == np.uint8 or bool(jnp.issubdtype(kind, jnp.inexact))


def _copy(value: Any, device: jax.Device) -> jax.Array:
    (placed,) = place([value], device)
    return jnp.copy(placed)
