"""The bridge from torch scripts to engines that run jax programs: everything user code touches stays a torch object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from polyaccel import trees
from polyaccel.dialects import Dialect, Role
from polyaccel.errors import PrepareError
from polyaccel.protocols import LossCall, RetainedLoss

from .exchange import PLACED, carry, placed_array
from .functions import Functions, feed, lifted
from .modules import ManagedModel, PreparedModule
from .optimizers import PreparedOptimizer, TorchOptimizerSource
from .tape import Recorder
from .tensors import DeviceParameter, DeviceTensor


class TorchToJax:
    """The Bridge of the torch dialect for ProgramEngines."""

    source: ClassVar[Dialect] = "torch"
    target: ClassVar[Dialect] = "flax"

    def __init__(self) -> None:
        self._recorder = Recorder()
        self._functions = Functions(self._recorder)

    @property
    def engine(self) -> Any:
        """The engine that it serves."""
        return self._recorder.engine

    @engine.setter
    def engine(self, engine: Any) -> None:
        self._recorder.use(engine)

    # -- down ----------------------------------------------------------------------------------------------------------------

    def lower(self, value: Any, role: Role) -> Any:
        """What the engine takes for an object of the script; see the Bridge protocol."""
        if role == "loss":
            steps = getattr(self.engine, "gradient_state", None)
            scale = 1.0 if steps is None else 1 / steps.num_steps  # of the gradients that programs give as outputs
            if isinstance(value, LossCall):
                return self._functions.lower(value, scale)
            if isinstance(value, RetainedLoss):
                return self._recorder.lower_loss(value.value, retain_graph=True, scale=scale)
            return self._recorder.lower_loss(value, scale=scale)
        if role == "model":
            return ManagedModel(value, self._recorder)
        if role == "optimizer":
            return TorchOptimizerSource(value, self._recorder)
        if role == "loader":
            return _host_loader(value)
        if role == "value":
            return self._lower_value(value)
        if role == "parameters":
            return self._lower_parameters(value)
        return value  # a scheduler works on the live param_groups

    def _lower_value(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, DeviceTensor) and value._cell is None:
            self._recorder.compute(value)
        engine = self._recorder.engine
        array, _ = feed(value)
        return engine.local(array) if hasattr(array, "sharding") else array

    def _lower_parameters(self, value: Any) -> list[tuple[Any, tuple[str, ...] | None]]:
        if isinstance(value, PreparedModule):
            return [(_pushed(value._model).handle, None)]
        wanted: dict[ManagedModel, list[str]] = {}
        for parameter in [value] if isinstance(value, torch.Tensor) else _listed(value):
            if not isinstance(parameter, DeviceParameter):
                raise PrepareError(
                    f"a tensor of shape {tuple(parameter.shape)} is no parameter of a prepared model",
                    "pass model.parameters() of the model that accelerator.prepare returned",
                )
            model: ManagedModel = parameter._cell._model
            wanted.setdefault(model, []).append(parameter._cell.name)
        return [
            (_pushed(model).handle, None if len(names) == len(model.handle.params) else tuple(names))
            for model, names in wanted.items()
        ]

    def whole_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """`module.state_dict()` of a prepared module. In a job of several processes it holds values on the host, gathered one by one
        where the processes have pieces: every process must call it."""
        state = module.state_dict()
        engine = self._recorder.engine
        if engine.topology.num_processes == 1:
            return state
        with engine.reading_whole():
            return {k: v.host().detach() if isinstance(v, DeviceTensor) else v for k, v in state.items()}

    def unwrap(self, value: Any) -> Any:
        """The user's own object behind what `engine.unwrap` gave."""
        if isinstance(value, ManagedModel):
            return value.module
        return value.optimizer if isinstance(value, TorchOptimizerSource) else value

    # -- up ------------------------------------------------------------------------------------------------------------------

    def lift(self, value: Any) -> Any:
        """What user code sees of a handle or of values; torch objects are left as they are."""
        source = getattr(value, "source", value)
        if isinstance(source, ManagedModel):
            if source.prepared is None:
                source.prepared = PreparedModule(source)
            return source.prepared
        if isinstance(source, TorchOptimizerSource):
            return PreparedOptimizer(source)
        if isinstance(value, torch.Tensor | nn.Module | torch.optim.Optimizer) or value is None:
            return value
        return trees.map_leaves(self._lift_leaf, value)

    def _lift_leaf(self, leaf: Any) -> Any:
        return lifted(self._recorder, leaf) if hasattr(leaf, "sharding") and hasattr(leaf, "dtype") else leaf

    def lift_batch(self, host_batch: Any, placed_batch: Any) -> Any:
        """The host batch itself, whose tensors carry their arrays on the device as long as nobody writes to them."""
        host, _ = trees.flatten(host_batch)
        placed, _ = trees.flatten(placed_batch)
        if len(host) != len(placed):
            raise PrepareError(
                f"a batch of {len(host)} leaves was placed as {len(placed)}",
                "report this: a loader changed its batches",
            )
        for tensor, array in zip(host, placed, strict=True):
            if isinstance(tensor, torch.Tensor) and array is not tensor and hasattr(array, "sharding"):
                carry(tensor, array)
        return host_batch

    def device(self, engine: Any) -> torch.device:
        """torch's cpu: what a script puts there is moved by the engine."""
        self._recorder.use(engine)
        return torch.device("cpu")

    def autocast(self, engine: Any, *, enabled: bool = True) -> AbstractContextManager[Any]:
        """Torch operations inside compute in the mixed precision; not enabled, in the dtype of their values."""
        self._recorder.use(engine)
        dtype = getattr(torch, engine.plan.precision.narrow_dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype, enabled=enabled)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, Iterable):
        return list(value)
    raise PrepareError(
        f"a {type(value).__name__} holds no parameters",
        "pass model.parameters() of the model that accelerator.prepare returned",
    )


def _pushed(model: ManagedModel) -> ManagedModel:
    model.push_writes()
    return model


def _host_loader(loader: DataLoader[Any]) -> Any:
    from polyaccel_torch.dialect.loaders import TorchHostLoader

    return TorchHostLoader(loader)


__all__ = ["PLACED", "TorchToJax", "placed_array"]
