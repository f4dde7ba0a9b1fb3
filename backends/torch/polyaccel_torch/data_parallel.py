"""DistributedDataParallel around a prepared model, as the settings ddp_... ask for it, with gradients compressed for their exchange."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from polyaccel.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from polyaccel.config import Config


def _orthogonalize_one(matrix: torch.Tensor, epsilon: float = 0) -> None:
    powerSGD_hook._orthogonalize(matrix.unsqueeze(0), epsilon)


def _batched_power_sgd() -> Any:
    """Torch's hook, made whole: it hands single matrices to a function that has taken batches of them since
    https://github.com/pytorch/pytorch/pull/75157, and would fail at its first compression. Nothing of torch is changed; where torch takes
    single matrices again, its hook is used as it is."""
    theirs = powerSGD_hook.batched_powerSGD_hook
    try:
        powerSGD_hook._orthogonalize(torch.ones(2, 1))
    except AssertionError:
        names = {**theirs.__globals__, "_orthogonalize": _orthogonalize_one}
        ours = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)
        return functools.update_wrapper(ours, theirs)
    return theirs


_HOOKS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "power_sgd": powerSGD_hook.powerSGD_hook,
    "batched_power_sgd": _batched_power_sgd(),
}
_WRAPPERS: dict[str, Any] = {
    "fp16": default_hooks.fp16_compress_wrapper,
    "bf16": default_hooks.bf16_compress_wrapper,
}
_TORCHS_BUCKET_MB = 25


def wrap(module: nn.Module, device: torch.device, config: Config) -> DistributedDataParallel:
    """The module with gradients averaged over processes; process 0's values are copied to all. Every process must call it.

    Raises ConfigError for options that PowerSGD does not have, and UnsupportedError for bf16 without NCCL.
    """
    state = _power_sgd(config)
    for setting in ("ddp_comm_hook", "ddp_comm_wrapper"):
        if getattr(config, setting) == "bf16" and dist.get_backend() != "nccl":  # torch would refuse it, too
            raise UnsupportedError(
                f"{setting}='bf16' needs NCCL, and this job exchanges gradients through {dist.get_backend()}",
                f"use {setting}='fp16' or 'no' here",
            )
    on_gpu = device.type == "cuda"
    # True is torch's own value too, and newer versions warn of everybody who gives it by this name.
    buffers: dict[str, Any] = {} if config.ddp_broadcast_buffers else {"broadcast_buffers": False}
    parallel = DistributedDataParallel(
        module,
        device_ids=[device.index] if on_gpu else None,
        output_device=device.index if on_gpu else None,
        # Torch's own size is asked for by None: its first bucket is then small, so that the exchange begins early.
        bucket_cap_mb=None if config.ddp_bucket_cap_mb == _TORCHS_BUCKET_MB else config.ddp_bucket_cap_mb,
        find_unused_parameters=config.ddp_find_unused_parameters,
        gradient_as_bucket_view=config.ddp_gradient_as_bucket_view,
        static_graph=config.ddp_static_graph,
        **buffers,
    )
    hook = _HOOKS.get(config.ddp_comm_hook)
    if hook is not None:
        wrapper = _WRAPPERS.get(config.ddp_comm_wrapper)
        parallel.register_comm_hook(state, hook if wrapper is None else wrapper(hook))
    return parallel


def _power_sgd(config: Config) -> powerSGD_hook.PowerSGDState | None:
    """The memory of PowerSGD: what compression left out of a gradient is added to the next one."""
    if "power_sgd" not in config.ddp_comm_hook:
        return None
    try:
        return powerSGD_hook.PowerSGDState(None, **config.ddp_comm_state_option)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"ddp_comm_state_option={dict(config.ddp_comm_state_option)!r}: {error}",
            "its names are those of torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.PowerSGDState",
        ) from error
