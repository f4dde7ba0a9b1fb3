"""Trains one model by plain torch and by polyaccel on jax, in the forms that a script may use, and holds everything against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bridge_scripts import PlainTorch, on_jax, run
from torch import nn

FORMS = ("loop", "function", "fused")
LossFunction = Callable[[Any, Any], torch.Tensor]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def mean_square(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(*batch) if isinstance(batch, tuple) else model(batch)
    return out.pow(2).mean()


def trained(
    acc: Any,
    make_model: Callable[[], nn.Module],
    loss_fn: LossFunction,
    batches: Callable[[], Sequence[Any]],
    form: str = "loop",
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    before_step: Callable[[Any, int], None] | None = None,
) -> dict[str, Any]:
    """Losses, gradients before every update, and the state at the end."""
    model = make_model()
    model, opt = acc.prepare(model, optimizer(model))
    losses, grads = [], []
    is_fused = form == "fused" and not isinstance(acc, PlainTorch)
    step = acc.train_step(loss_fn, model, opt) if is_fused else None
    for index, batch in enumerate(batches()):
        if before_step is not None:
            before_step(model, index)
        if step is not None:
            losses.append(step(batch))
            continue
        if form == "function":
            loss = acc.backward(loss_fn, model, batch)
        else:
            loss = loss_fn(model, batch)
            acc.backward(loss)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    model.eval()
    found = {"losses": losses, "state": dict(model.state_dict()), "buffers": dict(model.named_buffers())}
    return found if form == "fused" else {**found, "grads": grads}


def assert_trains_as_torch(
    make_model: Callable[[], nn.Module],
    batches: Callable[[], Sequence[Any]],
    loss_fn: LossFunction = mean_square,
    *,
    forms: Sequence[str] = ("loop", "function"),
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    before_step: Callable[[Any, int], None] | None = None,
    atol: float = 2e-6,
    rtol: float = 2e-5,
    **options: Any,
) -> None:
    """Losses, gradients, parameters and buffers of every step agree; float32 sums in another order leave the tolerance."""
    for form in forms:

        def script(acc: Any, form: str = form) -> Any:
            return trained(acc, make_model, loss_fn, batches, form, optimizer, before_step)

        expected, actual = run(script, PlainTorch()), run(script, on_jax(**options))
        assert expected["losses"][0].isfinite()
        assert len(expected["losses"]) > 1
        torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda m, form=form: f"{form}: {m}")
