"""How processes meet and exchange gradients: Accelerate's InitProcessGroupKwargs and DistributedDataParallelKwargs."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from polyaccel.config.handler import KwargsHandler
from polyaccel.errors import ConfigError


class DDPCommunicationHookType(enum.StrEnum):
    """How DistributedDataParallel compresses gradients for their exchange."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """How torch's DistributedDataParallel is made around a prepared model; every field is the setting `ddp_...`.

    The engines xla and jax exchange gradients inside their programs: what would change numbers there is refused by name, what would
    not (bucket_cap_mb, gradient_as_bucket_view, find_unused_parameters, static_graph) is said to have no effect.

    Args:
        dim: only 0: a process has one device.
        broadcast_buffers: every forward pass begins with the buffers of process 0.
        bucket_cap_mb: megabytes of gradients that are exchanged together.
        find_unused_parameters: look, in every step, for parameters that the loss does not depend on.
        check_reduction: only False: torch has given it up.
        gradient_as_bucket_view: gradients live in the memory that is exchanged, once in place of twice. Accelerate: False.
        static_graph: every step uses the same parameters in the same order.
        comm_hook: how gradients are compressed. PowerSGD starts after `start_powerSGD_iter` steps of its options.
        comm_wrapper: a cast to fp16 or bf16 around a compression.
        comm_state_option: options of torch's PowerSGDState.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_state_option: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every field that DistributedDataParallel itself takes."""
        return {name: value for name, value in super().to_dict().items() if not name.startswith("comm_")}

    def settings(self) -> dict[str, Any]:
        """The settings ddp_... Raises ConfigError for what torch no longer has."""
        given = self.given()
        if given.pop("dim", 0) != 0:
            raise ConfigError(
                f"DistributedDataParallelKwargs: dim={self.dim!r}", "leave it out: a process has one device"
            )
        if given.pop("check_reduction", False):
            raise ConfigError(
                "DistributedDataParallelKwargs: check_reduction=True has no effect in torch", "leave it out"
            )
        return {f"ddp_{name}": value for name, value in given.items()}


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How the processes of a job find each other.

    Args:
        backend: torch's: "gloo" or "nccl"; not given: what the devices need. The setting process_group.
        init_method: only None or "env://": the launcher's variables say where the others are.
        timeout: how long a process waits for the others in an exchange. The setting timeout_s.
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def settings(self) -> dict[str, Any]:
        """The settings process_group and timeout_s. Raises ConfigError for another way to meet, and for no time."""
        given, settings = self.given(), {}
        if given.get("init_method") not in (None, "env://"):
            raise ConfigError(
                f"InitProcessGroupKwargs: init_method={self.init_method!r} is another way to meet than the launcher's",
                "leave it out; `polyaccel launch --main-process-ip ... --main-process-port ...` says where",
            )
        if given.get("backend") is not None:
            settings["process_group"] = given["backend"]
        if self.timeout is not None:
            if self.timeout.total_seconds() < 1:
                raise ConfigError(
                    f"InitProcessGroupKwargs: timeout={self.timeout!r} is no time to wait", "give a second or more"
                )
            settings["timeout_s"] = round(self.timeout.total_seconds())
        return settings
