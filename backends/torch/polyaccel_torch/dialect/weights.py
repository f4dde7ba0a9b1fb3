"""Token weights of a gradient window in torch: what has been counted, and the one division that makes a weighted mean of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from polyaccel.protocols import LossCall, RetainedLoss
from polyaccel.weighting import named_weight

Scalar = float | torch.Tensor  # on the host, or a float32 scalar on the device


class WindowWeights:
    """`total` is this process's sum of weights; a backward of weight w adds w * `unit` * gradient. Nothing waits for the device.

    Gradients of several processes are averaged by DistributedDataParallel, so what they hold after the window is
    unit / num_shards * sum(w * gradient) over all shards, and `close` makes that sum(w * gradient) / sum(w).
    """

    __slots__ = ("count", "total", "unit")

    def __init__(self, total: Scalar = 0.0, unit: Scalar = 1.0) -> None:
        self.total = total
        self.unit = unit
        self.count = 0

    def add(self, weight: Scalar) -> None:
        """Count the weight of one backward."""
        self.total = self.total + weight if self.count else weight
        self.count += 1

    def close(self, gradients: list[torch.Tensor], total: Scalar, num_shards: int) -> None:
        """Divide by `total`, the sum over `num_shards` shards. Where it is 0 the gradients become 0, whatever they were."""
        if isinstance(total, torch.Tensor):
            is_empty = total == 0
            unit = num_shards / torch.where(is_empty, torch.ones_like(total), total)
            _multiply(gradients, unit / self.unit)
            for gradient in gradients:  # 0 * nan would be nan: a loss may well be 0 / 0 where nothing counts
                _zero_where(gradient, is_empty)
            before = self.unit if isinstance(self.unit, torch.Tensor) else torch.full_like(unit, self.unit)
            self.unit = torch.where(is_empty, before, unit)
        elif total == 0:
            for gradient in gradients:
                gradient.zero_()
        else:
            _multiply(gradients, num_shards / total / self.unit)
            self.unit = num_shards / total


def as_scalar(weight: Any, device: torch.device) -> Scalar:
    """A weight as it is multiplied: numbers stay on the host, tensors come to the device as float32 scalars."""
    if not isinstance(weight, torch.Tensor):
        return float(weight)
    return weight.detach().reshape(()).to(device, torch.float32, non_blocking=True)


def on_device(value: Scalar, device: torch.device) -> torch.Tensor:
    """A float32 scalar there; a number is written by the device itself, which nobody waits for."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=device)


def unpacked(loss: Any, weight: Any) -> tuple[Any, Any, Any, bool]:
    """(result of a call or None, loss value, weight, retains the graph) of what `Engine.backward` takes."""
    if type(loss) is LossCall:
        with torch.enable_grad():
            result = loss.function(*loss.args, **loss.kwargs)
        if isinstance(weight, str):
            weight = named_weight(result, weight)
        return result, result[0] if isinstance(result, tuple) else result, weight, False
    if type(loss) is RetainedLoss:
        return None, loss.value, weight, True
    return None, loss, weight, False


def gradients_of(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """The gradients that parameters of these modules hold, each once; of one that is cut over processes, this one's piece."""
    found: dict[int, torch.Tensor] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.grad is not None:
                grad: Any = parameter.grad
                found[id(parameter)] = grad.to_local() if hasattr(grad, "to_local") else grad
    return list(found.values())


@torch.no_grad()
def multiply(gradients: list[torch.Tensor], factor: Scalar) -> None:
    """In place, in the memory that an exchange may hold too."""
    _multiply(gradients, factor)


def _multiply(gradients: list[torch.Tensor], factor: Scalar) -> None:
    for group in _kinds(gradients):
        torch._foreach_mul_(group, factor.to(group[0].device) if isinstance(factor, torch.Tensor) else factor)


def _kinds(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    kinds: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype, gradient.layout), []).append(gradient)
    yield from kinds.values()


def _zero_where(gradient: torch.Tensor, is_empty: torch.Tensor) -> None:
    values = gradient._values() if gradient.is_sparse else gradient
    values.masked_fill_(is_empty.to(values.device), 0)
