"""What the engine asks where parameters are cut over processes: all of it for one mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from polyaccel.config.settings import SETTINGS
from polyaccel.errors import UnsupportedError
from polyaccel.protocols import Shard
from polyaccel_torch.big_models.empty import init_empty_weights
from polyaccel_torch.sharded import clipping, fsdp, state
from polyaccel_torch.sharded.averages import PieceAverage
from polyaccel_torch.sharded.mesh import ShardedMesh
from polyaccel_torch.sharded.placing import Placing
from polyaccel_torch.sharded.scaling import ShardedGradScaler
from polyaccel_torch.sharded.tensor import let_plain_tensors_be_whole

if TYPE_CHECKING:
    from polyaccel.config import Config
    from polyaccel.plan import Plan

_NOTHING: AbstractContextManager[None] = nullcontext()


class Sharding:
    """Models, optimizers, gradients and states on the mesh of a plan. Every process must make it, and call all of it alike."""

    def __init__(self, plan: Plan, config: Config, device: torch.device) -> None:
        _refuse_settings(plan, config)
        self.mesh = ShardedMesh(plan, device, timedelta(seconds=config.timeout_s))
        self._placing = Placing(self.mesh, plan, device)
        self._averages_each_batch = config.sync_each_batch

    # -- prepare -------------------------------------------------------------------------------------------------------

    def create_model(self, make: Callable[[], Any]) -> Any:
        """A model without memory for its parameters."""
        with init_empty_weights():
            return make()

    def prepare_model(self, model: nn.Module, *, device_placement: bool) -> None:
        """Cut a model in place; its parameters are other objects afterwards. Raises PrepareError or UnsupportedError before that."""
        if not device_placement:
            raise UnsupportedError(
                f"device_placement=False for {type(model).__name__}: a model that is cut over processes lies on their devices",
                "leave device_placement out",
            )
        if hasattr(model, "read_arrays"):
            raise UnsupportedError(
                f"{type(model).__name__} keeps arrays of another framework, which cannot be cut over processes of torch",
                "use backend='jax' for this script, or a mesh of data and replica",
            )
        self._placing.place(model)

    def adopt(self, optimizer: Optimizer) -> None:
        """Let an optimizer that was made before its model was cut update the pieces."""
        self._placing.adopt(optimizer)

    def before_backward(self) -> None:
        """In the thread that is about to differentiate, which need not be the one of the forward pass."""
        if self.mesh.tensor is not None or self.mesh.sequence is not None:
            let_plain_tensors_be_whole()

    # -- the step ------------------------------------------------------------------------------------------------------

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, a backward leaves gradients unaveraged; nothing where no axis splits the batch."""
        part = fsdp.averaging_part(model)
        return _NOTHING if part is None else fsdp.accumulating(part)

    def exchanging(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, a backward averages gradients, also inside `accumulating`."""
        part = fsdp.averaging_part(model)
        return _NOTHING if part is None else fsdp.exchanging(part)

    def clip_grad_norm(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """The norm of the whole gradient, and all pieces scaled alike."""
        return clipping.clip_grad_norm(parameters, max_norm, norm_type, self.mesh)

    def clip_grad_value(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Element by element."""
        clipping.clip_grad_value(parameters, clip_value)

    def make_scaler(self, *options: Any, **settings: Any) -> ShardedGradScaler:
        """What scales the loss under fp16."""
        return ShardedGradScaler(*options, **settings)

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Beside `zero_grad`: what micro batches without an exchange have left, which no parameter of the optimizer shows."""
        fsdp.drop_own_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])

    def parameter_average(self, module: nn.Module) -> PieceAverage:
        """Of the pieces."""
        return PieceAverage(module)

    # -- state ---------------------------------------------------------------------------------------------------------

    def read_model(self, module: nn.Module) -> Iterator[Shard]:
        """See `state.read_model`."""
        return state.read_model(module, self.mesh)

    def write_model(self, module: nn.Module, shards: Iterable[Shard]) -> None:
        """See `state.write_model`."""
        state.write_model(module, shards)

    def read_optimizer(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[Shard]:
        """See `state.read_optimizer`."""
        return state.read_optimizer(optimizer, parameters, self.mesh)

    def write_optimizer(
        self, optimizer: Optimizer, parameters: dict[str, nn.Parameter], shards: Iterable[Shard]
    ) -> None:
        """See `state.write_optimizer`."""
        state.write_optimizer(optimizer, parameters, shards)

    def read_gradients(self, module: nn.Module, *, scale: float) -> Iterator[Shard]:
        """See `state.read_gradients`."""
        return state.read_gradients(module, self.mesh, scale=scale)

    def write_gradients(self, module: nn.Module, shards: Iterable[Shard], *, scale: float) -> None:
        """See `state.write_gradients`."""
        state.write_gradients(module, shards, self.mesh, scale=scale, are_own=not self._averages_each_batch)

    def whole_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """See `state.whole_state_dict`."""
        return state.whole_state_dict(module)


def _refuse_settings(plan: Plan, config: Config) -> None:
    """Raises UnsupportedError for settings of DistributedDataParallel, which has no part here, for torch.compile of parts of sequences,
    and for offload where FSDP2 has no part."""
    for name, setting in SETTINGS.items():
        value = getattr(config, name, None) if name.startswith("ddp_") else None
        if value is not None and value != setting.default:
            raise UnsupportedError(
                f"{name}={value!r} ({config.sources.get(name, 'default')}) is a setting of DistributedDataParallel, and"
                f" mesh.fsdp={plan.mesh.fsdp}, mesh.tensor={plan.mesh.tensor},"
                f" mesh.sequence={plan.mesh.sequence} cut models over processes",
                "leave it out, or use a mesh of data and replica alone",
            )
    if plan.compile and plan.mesh.sequence > 1:
        raise UnsupportedError(
            f"compile=True ({config.sources.get('compile', 'default')}) with mesh.sequence={plan.mesh.sequence}: torch.compile does not"
            " know how operations on parts of sequences are computed here",
            "leave compile out, or mesh.sequence at 1",
        )
    if plan.offload != "none" and plan.mesh.num_data_shards == 1:
        raise UnsupportedError(
            f"offload={plan.offload!r} ({config.sources.get('offload', 'default')}) with mesh.tensor={plan.mesh.tensor},"
            f" mesh.sequence={plan.mesh.sequence} alone:"
            " FSDP2 offloads what it cuts or repeats over data shards",
            "use mesh.fsdp, alone or with them",
        )
