"""What stands in for some of torch's own code while a model is captured: code that reads values, or hides what it computes.

Only modules whose `forward` is torch's own, or is named in routed_experts.py, are touched, and only while a capture runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from polyaccel.errors import PrepareError

from . import packed_sequences
from .recurrent import SCANNED
from .routed_experts import fixed_form_of
from .shards import SumOverShards


@contextlib.contextmanager
def substituted(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the stand-ins are in place. The caller restores the modules' attributes afterwards."""
    for module in modules:
        forward = _forward_of(module)
        if forward is not None:
            module.__dict__["forward"] = partial(forward, module)
        module.__dict__["_apply"] = partial(_convert, module)
    with _Functions(), _uncompiled():
        yield


def _uncompiled() -> AbstractContextManager[None]:
    """What torch.compile made, modules and functions, runs as it was written: the captured program is compiled as a whole."""
    if "torch._dynamo.eval_frame" not in sys.modules:  # importing it takes a second
        return contextlib.nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    own = type(module).forward
    if own is nn.SyncBatchNorm.forward:
        return _synchronized_batch_norm
    if own is _BatchNorm.forward and isinstance(module, _BatchNorm) and module.momentum is None:
        return _averaging_batch_norm
    return packed_sequences.forward_of(module) or fixed_form_of(module)


def _convert(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`module.to(dtype)` inside forward, as routers have it: torch exchanges even what is right already, which fakes do not allow."""
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    if all(fn(tensor) is tensor for tensor in tensors):
        return module
    raise PrepareError(
        f"forward converts a {type(module).__name__} to another dtype or device, and with it the parameters that are trained",
        "convert it once, before accelerator.prepare",
    )


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **SCANNED,
    torch._VF._pack_padded_sequence: packed_sequences.pack,
    torch._VF._pad_packed_sequence: packed_sequences.unpack,
}


# -- batch normalization ---------------------------------------------------------------------------------------------------------


def _factor(module: _BatchNorm) -> torch.Tensor | float:
    """How much of the running statistics a batch replaces; without momentum each batch counts alike."""
    count = module.num_batches_tracked
    assert count is not None
    count.add_(1)
    return 1.0 / count.float() if module.momentum is None else module.momentum


def _move(module: _BatchNorm, factor: torch.Tensor | float, mean: torch.Tensor, variance: torch.Tensor) -> None:
    with torch.no_grad():
        for running, new in ((module.running_mean, mean), (module.running_var, variance)):
            assert running is not None
            running.copy_(running * (1 - factor) + new.to(running.dtype) * factor)


def _averaging_batch_norm(module: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
    """momentum=None: torch's own code reads the number of batches to find its factor."""
    if not (module.training and module.track_running_stats):
        return type(module).forward(module, input)
    module._check_input_dim(input)
    dims = [0, *range(2, input.dim())]
    with torch.no_grad():
        variance, mean = torch.var_mean(input.float() if input.itemsize < 4 else input, dims)
        _move(module, _factor(module), mean, variance)
    return F.batch_norm(input, None, None, module.weight, module.bias, True, 0.0, module.eps)


def _synchronized_batch_norm(module: nn.SyncBatchNorm, input: torch.Tensor) -> torch.Tensor:
    """The statistics of the batch of all data shards, as torch.distributed's kernels compute them."""
    module._check_input_dim(input)
    module._check_non_zero_input_channels(input)
    has_running = module.running_mean is not None
    if not module.training and has_running:
        return F.batch_norm(
            input, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
    x = input.float() if input.itemsize < 4 else input
    dims = [0, *range(2, x.dim())]
    count = SumOverShards.apply(x.new_full((), x.numel() // x.shape[1]))
    mean = SumOverShards.apply(x.sum(dims)) / count
    shape = [1, -1, *[1] * (x.dim() - 2)]
    centered = x - mean.view(shape)
    variance = SumOverShards.apply(centered.square().sum(dims)) / count
    if module.training and module.track_running_stats:
        _move(module, _factor(module), mean, variance * (count / (count - 1)))
    out = centered * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        out = out * module.weight.view(shape) + module.bias.view(shape)
    return out.to(input.dtype)
