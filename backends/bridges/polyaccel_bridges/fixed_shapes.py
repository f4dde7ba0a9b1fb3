"""Functions in which torch looks at values or chooses a shape by them, in forms that a captured program can contain.

A function mode puts them in while user code is captured: same arguments, same results. Where torch raises by value (a negative
variance), the program gives NaN there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.overrides import TorchFunctionMode

from . import lowerings  # noqa: F401 - defines torch.ops.polyaccel
from .ctc_targets import SELECTIONS, SelectedTargets
from .raising_branches import Raise
from .value_checks import READS, VALUE_CHECKS


class FixedShapes(TorchFunctionMode):
    """While active, the functions of this file stand in for torch's. `raises`: what user code would raise by value."""

    def __init__(self) -> None:
        super().__init__()
        self.raises: list[Raise] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = READS.get(func)
        if read is not None:
            return read(self.raises, *args)
        return _FORMS.get(func, func)(*args, **(kwargs or {}))


# --- connectionist temporal classification --------------------------------------------------------------------------------------


class _Ctc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_probs: torch.Tensor,
        targets: torch.Tensor,
        input_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
        blank: int,
        zero_infinity: bool,
    ) -> torch.Tensor:
        losses, log_alpha = torch.ops.polyaccel.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank)
        ctx.save_for_backward(log_probs, targets, input_lengths, target_lengths, losses, log_alpha)
        ctx.settings = blank, zero_infinity
        result: torch.Tensor = losses
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad = torch.ops.polyaccel.ctc_loss_backward(grads[0], *ctx.saved_tensors, *ctx.settings)
        return grad, None, None, None, None, None


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor | SelectedTargets,
    input_lengths: torch.Tensor | Sequence[int],
    target_lengths: torch.Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> torch.Tensor:
    """`F.ctc_loss` and `torch.ctc_loss`: (time, batch, classes) or (time, classes); targets padded or concatenated."""
    if log_probs.dtype not in (torch.float32, torch.float64):
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError(f'"ctc_loss_cpu" not implemented for {log_probs.dtype}: pass log_probs.float()')
        log_probs = log_probs.float()
    is_batched = log_probs.dim() == 3
    if not is_batched:
        log_probs = log_probs.unsqueeze(1)
    batch, classes = log_probs.shape[1:]
    if not 0 <= blank < classes:
        raise RuntimeError(f"blank must be in label range: {blank} of {classes} classes")
    inputs, outputs = (_lengths(lengths, batch) for lengths in (input_lengths, target_lengths))
    if isinstance(targets, SelectedTargets):
        targets = targets.rows()
    padded = targets if targets.dim() == 2 else _padded(targets, outputs, target_lengths, batch)
    losses = _Ctc.apply(log_probs, padded, inputs, outputs, blank, zero_infinity)
    is_unknown = ((padded < 0) | (padded >= classes)) & (torch.arange(padded.shape[1]) < outputs.unsqueeze(1))
    losses = losses * torch.where(is_unknown.any(1), math.nan, 1.0).to(losses.dtype)
    if zero_infinity:
        losses = torch.where(losses == math.inf, torch.zeros_like(losses), losses)
    kind = _REDUCTIONS[reduction] if isinstance(reduction, str) else reduction
    if kind == 1:
        return (losses / outputs.clamp_min(1).to(losses.dtype)).mean()
    if kind == 2:
        return losses.sum()
    return losses if is_batched else losses.squeeze(0)


def _lengths(lengths: torch.Tensor | Sequence[int], batch: int) -> torch.Tensor:
    tensor = lengths if isinstance(lengths, torch.Tensor) else torch.tensor(lengths)
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    if tensor.shape != (batch,):
        raise RuntimeError(f"ctc_loss needs {batch} lengths, one per sequence, not {list(tensor.shape)}")
    return tensor.long()


def _padded(targets: torch.Tensor, outputs: torch.Tensor, given: Any, batch: int) -> torch.Tensor:
    """Concatenated targets as (batch, longest); where lengths are tensors, any of them may be as long as all together."""
    if batch == 1:
        return targets.reshape(1, -1)
    known = not isinstance(given, torch.Tensor)
    longest = max((int(length) for length in given), default=0) if known else targets.numel()
    starts = (outputs.cumsum(0) - outputs).unsqueeze(1)
    if not targets.numel():
        return targets.new_zeros(batch, 0)
    places = (starts + torch.arange(longest)).clamp(max=targets.numel() - 1)
    return targets.reshape(-1)[places]


# --- checks by value ------------------------------------------------------------------------------------------------------------


def _gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.gaussian_nll_loss`; NaN where a variance is negative, which torch refuses."""
    if not isinstance(var, torch.Tensor):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = torch.full_like(input, var)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif not (input.shape[:-1] == var.shape[:-1] and var.shape[-1] == 1):
            raise ValueError("var is of incorrect size")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction} is not valid")
    floored = var.clone()
    with torch.no_grad():  # the gradient passes where the floor holds, as in torch
        floored.clamp_(min=eps)
    loss = 0.5 * (floored.log() + (input - target) ** 2 / floored)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    loss = torch.where(var < 0, math.nan, loss)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _cov(
    input: torch.Tensor,
    *,
    correction: int = 1,
    fweights: torch.Tensor | None = None,
    aweights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.cov`, without its checks that the weights are not negative and its warning of too few observations."""
    rows = input.reshape(1, -1) if input.dim() < 2 else input
    if rows.dim() > 2 or rows.dtype is torch.bool:
        return torch.cov(input, correction=correction)  # torch's own error
    weights = fweights
    if aweights is not None:
        weights = aweights if weights is None else weights * aweights
    total = torch.tensor(rows.shape[1]) if weights is None else weights.sum()
    mean = (rows if weights is None else rows * weights).sum(1) / total
    freedom = total - correction
    if weights is not None and aweights is not None and correction:
        freedom = total - correction * (weights * aweights).sum() / total
    freedom = torch.where(freedom <= 0, torch.zeros_like(freedom), freedom)
    centred = rows - mean.unsqueeze(1)
    product = centred @ (centred if weights is None else centred * weights).t().conj()
    return (product / freedom).squeeze()


def _corrcoef(input: torch.Tensor) -> torch.Tensor:
    """`torch.corrcoef`."""
    covariance = _cov(input)
    if covariance.dim() == 0:
        return covariance / covariance
    variances = covariance.diagonal()
    deviation = (variances.real if variances.is_complex() else variances).sqrt()
    result = covariance / deviation.unsqueeze(1) / deviation
    if result.is_complex():
        return torch.complex(result.real.clamp(-1, 1), result.imag.clamp(-1, 1))
    return result.clamp(-1, 1)


def _combinations(input: torch.Tensor, r: int = 2, with_replacement: bool = False) -> torch.Tensor:
    """`torch.combinations`: which elements meet depends on their number alone."""
    if input.dim() != 1 or r < 0:
        return torch.combinations(input, r, with_replacement)  # torch's own error
    if r == 0:
        return input.new_empty(0)
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    chosen = torch.tensor(list(choose(range(input.numel()), r)), dtype=torch.long).reshape(-1, r)
    return input[chosen]


def _one_hot(input: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`F.one_hot` with the number of classes."""
    if num_classes < 0:
        raise DynamicOutputShapeException(cast(Any, F.one_hot))
    if input.dtype is not torch.int64:
        return torch.nn.functional.one_hot(input, num_classes)  # torch's own error
    return (input.unsqueeze(-1) == torch.arange(num_classes)).long()


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> torch.Tensor:
    """In one piece: its chunks are an opaque operation, and XLA decides what is kept."""
    return F.linear_cross_entropy(*args, **kwargs)


_FORMS: dict[Any, Callable[..., Any]] = {
    **SELECTIONS,
    **VALUE_CHECKS,
    **({F.linear_cross_entropy: _linear_cross_entropy} if hasattr(F, "linear_cross_entropy") else {}),
    F.ctc_loss: _ctc_loss,
    torch.ctc_loss: _ctc_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.one_hot: _one_hot,
    torch.combinations: _combinations,
    torch.Tensor.cov: _cov,
    torch.cov: _cov,
    torch.Tensor.corrcoef: _corrcoef,
    torch.corrcoef: _corrcoef,
}
