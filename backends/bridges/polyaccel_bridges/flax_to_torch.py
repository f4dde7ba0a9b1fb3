"""Flax scripts on a torch engine: models become nn.Modules and optimizers torch optimizers whose insides are jitted JAX."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from polyaccel import trees
from polyaccel.data import DataSharding, refuse_prepared
from polyaccel.dialects import Role
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import Engine, LoaderSpec, LossCall, StepSpec
from polyaccel_jax import dialect
from polyaccel_jax.dialect.functional import Handle
from polyaccel_jax.dialect.iterables import HostIterable

from .exchange import to_tensor
from .flax_arrays import host, is_key, place, to_jax, to_torch
from .flax_modules import FlaxModule, HeldModel
from .flax_optimizers import HeldOptimizer, LoweredOptimizer
from .flax_programs import FlaxRuntime, torch_call
from .flax_steps import fused_step


class FlaxToTorch:
    """Lowers flax.nnx and flax.linen models, optax, loaders and loss functions; user code sees jax arrays throughout.

    Gradients, clipping, accumulation and their exchange between processes are the torch engine's. On a GPU both frameworks
    allocate memory: set XLA_PYTHON_CLIENT_PREALLOCATE=false, or jax takes three quarters of it at its first use.
    """

    source = "flax"
    target = "torch"
    engine: Any = None
    trains_with_native_optimizers = True  # torch.optim, over the parameters that `torch_module` shows

    def __init__(self) -> None:
        self._made: FlaxRuntime | None = None
        self._num_models = 0

    @property
    def _runtime(self) -> FlaxRuntime:
        if self._made is None:
            self._made = FlaxRuntime(self.engine)
        return self._made

    # -- in --------------------------------------------------------------------------------------------------------------

    def lower(self, value: Any, role: Role) -> Any:
        """A flax object as the torch engine takes it; see `polyaccel.protocols.Bridge`."""
        if role == "model":
            return self._lower_model(value)
        if role == "optimizer":
            return LoweredOptimizer(value)
        if role == "loader":
            return FlaxHostLoader(value)
        if role == "loss":
            return self._lower_loss(value)
        if role == "value":
            return self._lower_value(value)
        if role == "parameters":
            return [parameter for parameter in _held(value).tensors.values() if isinstance(parameter, nn.Parameter)]
        raise UnsupportedError(
            f"a {type(value).__name__} is no {role} of a flax script", "put the schedule into the optax transformation"
        )

    def _lower_model(self, module: Any) -> FlaxModule:
        if self._runtime.plan.compile:
            raise UnsupportedError(
                f"compile=True is torch.compile, and {type(module).__name__} is a flax model, which jax compiles in any case",
                "leave compile out",
            )
        source = dialect.model_source(module)
        held = HeldModel(self._runtime, f"model_{self._num_models}", source)
        self._num_models += 1
        source.attach(held)
        return FlaxModule(held)

    def _lower_loss(self, loss: Any) -> LossCall:
        if not isinstance(loss, LossCall):
            raise UnsupportedError(
                f"backward(loss) got a value of type {type(loss).__name__}: a jax value cannot be differentiated afterwards",
                "pass the function: loss = accelerator.backward(loss_fn, model, batch),"
                " or step = accelerator.train_step(loss_fn, model, optimizer)",
            )
        # Calls are kept with the model that they belong to, and go when it goes.
        first = next((argument for argument in loss.args if isinstance(argument, Handle)), None)
        known = None if first is None else first._polyaccel_model.known_calls
        return torch_call(self._runtime, dialect.lower_call(loss, known))

    def train_step(self, spec: StepSpec) -> Any:
        """The engine's fused step for a flax script, or None where it is made of the separate calls."""
        return fused_step(self._runtime, spec)

    def _lower_value(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        if is_key(value):
            raise UnsupportedError(
                "random keys cannot be exchanged between processes", "exchange jax.random.key_data(key)"
            )
        device = self.engine.device
        if not isinstance(value, jax.Array):
            return to_tensor(np.asarray(value)).to(device)
        if not value.is_fully_addressable or len(value.devices()) > 1:
            return to_tensor(host(value)).to(device)
        (array,) = place([value], self._runtime.device)
        return to_torch(array)

    # -- out -------------------------------------------------------------------------------------------------------------

    def lift(self, value: Any) -> Any:
        """An engine's handle as what user code holds, or values with jax arrays for tensors."""
        if isinstance(value, nn.Module):
            module = self.engine.unwrap(value)
            module.held.adopt(value)
            return dialect.model_handle(module.held.source, module.held)
        if isinstance(value, torch.optim.Optimizer):
            optimizer: Any = getattr(value, "optimizer", value)
            return dialect.optimizer_handle(optimizer.source, HeldOptimizer(self._runtime, value, optimizer))
        return jax.tree.map(self._lift_leaf, value)

    def _lift_leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        array = self._runtime.array_of(leaf)
        return to_jax(leaf, self._runtime.device) if array is None else array

    def lift_batch(self, host_batch: Any, placed_batch: Any) -> Any:
        """The batch as jax arrays on the engine's device; what is no array stays."""
        leaves, structure = trees.flatten(placed_batch)
        where = [index for index, leaf in enumerate(leaves) if _is_batch_array(leaf)]
        waiting = [index for index in where if not isinstance(leaves[index], torch.Tensor)]
        for index, array in zip(waiting, place([leaves[i] for i in waiting], self._runtime.device), strict=True):
            leaves[index] = array
        return structure.unflatten([self._lift_leaf(leaf) for leaf in leaves])

    def unwrap(self, value: Any) -> Any:
        """The user's own model, with current values."""
        return value.held.source.current() if isinstance(value, FlaxModule) else value

    def autocast(self, engine: Engine, *, enabled: bool = True) -> AbstractContextManager[None]:
        """Nothing: the modules themselves compute in the plan's precision, and jax has no other switch for it."""
        return nullcontext()

    def device(self, engine: Engine) -> jax.Device:
        """The jax device that is the engine's torch device."""
        return self._runtime.device


def torch_module(model: Any) -> nn.Module:
    """The nn.Module that holds a prepared flax model's parameters on a torch engine, under the names that flax gave them.

    For torch's own tools: `torch.optim.AdamW(torch_module(model).parameters())`, to be prepared after the model, parameter groups
    by name, hooks on gradients. From now on every parameter gets a gradient. It cannot be called like a torch module: the
    prepared flax model and the loss function stay what is called. Raises PrepareError for a model that no torch engine holds.
    """
    held = model._polyaccel_model if isinstance(model, Handle) else None
    if not isinstance(held, HeldModel):
        raise PrepareError(
            f"a {type(model).__name__} has no torch parameters",
            "pass the flax model that accelerator.prepare returned, with backend='torch'",
        )
    held.source.train(held.names)
    held.is_written_by_torch = True
    module: nn.Module = held.engine.engine.unwrap(held.handle)
    return module


class FlaxHostLoader:
    """An iterable of batches, or a grain loader or dataset, that can be cut."""

    def __init__(self, loader: Any) -> None:
        refuse_prepared(loader)
        self.loader = loader

    def shard(self, sharding: DataSharding, *, spec: LoaderSpec, exchange: Any = None, **_: Any) -> HostIterable:
        """This process's part of every global batch. An iterable draws its own order, which must be the same everywhere."""
        spec.check_iterable(self.loader, is_alone=exchange is None)
        return HostIterable(self.loader, sharding)


def _held(value: Any) -> HeldModel:
    held = value._polyaccel_model if isinstance(value, Handle) else None
    if not isinstance(held, HeldModel):
        raise PrepareError(
            f"gradients of a {type(value).__name__} cannot be clipped",
            "pass the prepared model: accelerator.clip_grad_norm_(model, max_norm)",
        )
    return held


def _is_batch_array(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | jax.Array) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufcV")
