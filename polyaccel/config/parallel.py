"""Over which devices parameters and sequences are cut: Accelerate's ParallelismConfig and its plugins of FSDP and tensor parallelism, as a
mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from polyaccel.config.handler import KwargsHandler
from polyaccel.errors import ConfigError, UnsupportedError


@dataclass
class ParallelismConfig(KwargsHandler):
    """Sizes of the job's parallel groups, whose product is the number of its devices; None: 1. All of them 1: data parallel.

    Args:
        dp_replicate_size: copies of the parameters: the mesh axis `data`.
        dp_shard_size: devices that share the parameters: `fsdp`.
        tp_size: devices that share single layers: `tensor`.
        cp_size, sp_size: devices that share sequences: `sequence`. One of the two.
        cp_backend, sp_backend, tp_handler, cp_handler, sp_handler: how Accelerate does it; here the engine decides.

    Raises ConfigError for sizes that are none, and for cp_size with sp_size.
    """

    dp_replicate_size: int | None = None
    dp_shard_size: int | None = None
    tp_size: int | None = None
    cp_size: int | None = None
    cp_backend: str | None = None
    sp_size: int | None = None
    sp_backend: str | None = None
    tp_handler: Any = None
    cp_handler: Any = None
    sp_handler: Any = None

    def __post_init__(self) -> None:
        for name in ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"ParallelismConfig: {name}={size!r} is no number of devices", "give 1 or more")
        if (self.cp_size or 1) > 1 and (self.sp_size or 1) > 1:
            raise ConfigError(
                f"ParallelismConfig: cp_size={self.cp_size} and sp_size={self.sp_size} both split sequences",
                "give one of the two",
            )

    @property
    def left_to_the_engine(self) -> list[str]:
        """What says how, and not over how many devices."""
        how = ("cp_backend", "sp_backend", "tp_handler", "cp_handler", "sp_handler")
        return [name for name, value in self.given().items() if name in how and value is not None]

    def settings(self) -> dict[str, Any]:
        """The setting mesh."""
        data, fsdp, tensor = self.dp_replicate_size or 1, self.dp_shard_size or 1, self.tp_size or 1
        sequence = max(self.cp_size or 1, self.sp_size or 1)
        if data * fsdp * tensor * sequence == 1:
            data = -1  # Accelerate too: no sizes at all are as many copies as there are processes
        return {"mesh": {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}}


@dataclass
class TorchTensorParallelPlugin(KwargsHandler):
    """Accelerate's earlier name of tensor parallelism: `mesh={"data": -1, "tensor": tp_size}`, and `fsdp` in place of `data` beside a
    FullyShardedDataParallelPlugin.

    Args:
        tp_size: devices that share single layers.
        torch_device_mesh: refused with UnsupportedError: the mesh is the Accelerator's.
    """

    tp_size: int = 1
    torch_device_mesh: Any = None

    def settings(self) -> dict[str, Any]:
        """The setting mesh. Raises ConfigError for a size that is none, UnsupportedError for a mesh of torch's."""
        if self.torch_device_mesh is not None:
            raise UnsupportedError(
                "TorchTensorParallelPlugin: torch_device_mesh is not supported: the mesh is the Accelerator's",
                "give the sizes alone, as Accelerator(mesh={'data': m, 'tensor': n})",
            )
        if isinstance(self.tp_size, bool) or not isinstance(self.tp_size, int) or self.tp_size < 1:
            raise ConfigError(
                f"TorchTensorParallelPlugin: tp_size={self.tp_size!r} is no number of devices", "give 1 or more"
            )
        return {"mesh": {"data": -1, "tensor": self.tp_size}} if self.tp_size > 1 else {}


# Fields that say how torch's FSDP works inside: no number depends on them, and an engine that shards decides them itself.
_OF_THE_ENGINE = (
    "fsdp_version",
    "backward_prefetch",
    "auto_wrap_policy",
    "state_dict_type",
    "state_dict_config",
    "optim_state_dict_config",
    "limit_all_gathers",
    "use_orig_params",
    "sync_module_states",
    "forward_prefetch",
    "cpu_ram_efficient_loading",
    "transformer_cls_names_to_wrap",
    "min_num_params",
)
_INSTEAD = {
    "mixed_precision_policy": "use mixed_precision='bf16' or 'fp16'",
    "ignored_modules": "leave it out: parameters that cannot be cut are repeated",
    "param_init_fn": "give the model its values before prepare",
}
_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}


@dataclass
class FullyShardedDataParallelPlugin(KwargsHandler):
    """Parameters, gradients and optimizer state shared by all devices: `mesh={"fsdp": -1}` under Accelerate's name.

    An engine that cannot shard refuses that mesh by name. Accelerate's fields are here, so that scripts can give them:

    Args:
        sharding_strategy, reshard_after_forward: FULL_SHARD (True) is mesh.fsdp, NO_SHARD is mesh.data; HYBRID_SHARD has to be
            written with its sizes, as `mesh={"data": hosts, "fsdp": devices_per_host}` or a ParallelismConfig.
        activation_checkpointing: True is the setting `remat="full"`.
        cpu_offload: True, or torch's CPUOffload or CPUOffloadPolicy, is the setting `offload="cpu"`, with pinned memory for a
            GPU.
        mixed_precision_policy, ignored_modules, param_init_fn: refused with UnsupportedError, which says what to do instead.
        all others: what they say is decided by the engine, and a line of the log says so.
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Any = None
    cpu_offload: Any = None
    ignored_modules: Iterable[Any] | str | None = None
    state_dict_type: Any = None
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = True
    use_orig_params: bool | None = None
    param_init_fn: Callable[[Any], None] | None = None
    sync_module_states: bool | None = None
    forward_prefetch: bool | None = None
    activation_checkpointing: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: list[str] | None = None
    min_num_params: int | None = None

    @property
    def left_to_the_engine(self) -> list[str]:
        """What says how torch's FSDP works inside."""
        return [name for name, value in self.given().items() if name in _OF_THE_ENGINE and value is not None]

    def settings(self) -> dict[str, Any]:
        """The settings mesh, remat and offload. Raises UnsupportedError for a field that would change something and has no counterpart."""
        for name, instead in _INSTEAD.items():
            if getattr(self, name):
                raise UnsupportedError(
                    f"FullyShardedDataParallelPlugin: {name}={getattr(self, name)!r} is not supported", instead
                )
        strategies = {self._strategy(name) for name in ("sharding_strategy", "reshard_after_forward")} - {None}
        named: dict[str, Any] = {"mesh": {"data": -1} if strategies == {"NO_SHARD"} else {"fsdp": -1}}
        if self.activation_checkpointing:
            named["remat"] = "full"
        if self._is_offloaded:
            named["offload"] = "cpu"
        return named

    @property
    def _is_offloaded(self) -> bool:
        """True, CPUOffload(offload_params=True) of FSDP1, and any CPUOffloadPolicy of FSDP2, which are known by name: torch may be away."""
        asked = getattr(self.cpu_offload, "offload_params", self.cpu_offload)
        return asked is True or type(asked).__name__ == "CPUOffloadPolicy"

    def _strategy(self, name: str) -> str | None:
        value = getattr(self, name)
        if value is None:
            return None
        if isinstance(value, bool):
            strategy = "FULL_SHARD" if value else "SHARD_GRAD_OP"
        else:
            text = str(getattr(value, "name", value)).rpartition(".")[2].upper()
            strategy = _STRATEGIES.get(text, text)
        if strategy.startswith("HYBRID"):
            raise UnsupportedError(
                f"FullyShardedDataParallelPlugin: {name}={value!r} does not say how many devices share the parameters",
                "write it as mesh={'data': hosts, 'fsdp': devices_per_host}, and leave the plugin out",
            )
        if strategy not in ("FULL_SHARD", "NO_SHARD"):
            raise UnsupportedError(
                f"FullyShardedDataParallelPlugin: {name}={value!r} is not supported",
                "leave it out for mesh={'fsdp': -1}, which shards parameters, gradients and optimizer state",
            )
        return strategy
