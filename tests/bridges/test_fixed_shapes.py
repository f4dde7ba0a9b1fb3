"""Functions in which torch reads values are captured in another form with the same results and gradients, or refused by name.

Tolerance: 2e-5 of the largest value, float32 sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured_parity import arrays_of, specs_of, train_both
from torch import nn

from polyaccel.errors import PrepareError
from polyaccel_bridges.capture import capture_forward
from polyaccel_bridges.replay import exact_dtypes, run_forward


def agree(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor, tolerance: float = 2e-5
) -> None:
    """`function(x, *others)` and its gradient for x, captured and in eager; the result is weighted, so that no element hides."""
    model = nn.Module()
    model.x = nn.Parameter(x)

    def step(modules: Any, *inputs: torch.Tensor) -> Any:
        out = function(modules["model"].x * 1.0, *inputs)
        return (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum(), [out.detach()]

    parity = train_both(step, {"model": model}, others)
    assert parity.worst < tolerance, parity


TIME, BATCH, CLASSES = 12, 3, 5
torch.manual_seed(0)
logits = torch.randn(TIME, BATCH, CLASSES)
targets = torch.tensor([[1, 2, 2, 3], [4, 0, 0, 0], [1, 1, 1, 0]])
input_lengths, target_lengths = torch.tensor([12, 7, 9]), torch.tensor([4, 1, 3])


def test_ctc_loss_in_all_its_forms() -> None:
    """Lengths as tensors or numbers; padded, concatenated and single targets; repeated targets, which need a blank between."""
    joined = torch.cat([row[:length] for row, length in zip(targets, target_lengths, strict=True)])
    repeated = torch.tensor([[1, 1, 1, 1]] * 3)

    def losses(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        padded, joined, repeated, inputs, outputs = given
        x = x.log_softmax(-1)
        found = [F.ctc_loss(x, padded, inputs, outputs, reduction=kind) for kind in ("none", "mean", "sum")]
        found += [
            F.ctc_loss(x, joined, inputs, outputs),
            F.ctc_loss(x, joined, (12, 7, 9), (4, 1, 3)),
            F.ctc_loss(x, repeated, (12,) * 3, (4,) * 3),
            F.ctc_loss(x[:, 0], padded[0], (10,), (4,), blank=4),
        ]
        return torch.cat([loss.reshape(-1) for loss in found])

    agree(losses, logits, targets, joined, repeated, input_lengths, target_lengths)


def test_ctc_loss_of_sequences_that_cannot_be_aligned() -> None:
    """A path of length 2 cannot hold four targets: infinite, or zero with zero_infinity; so is an empty target, which is allowed."""
    short, lengths = torch.tensor([2, 7, 9]), torch.tensor([4, 0, 3])

    def loss(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(x.log_softmax(-1), *rest, zero_infinity=True)

    agree(loss, logits, targets, short, lengths)


def test_ctc_loss_module_under_autocast_is_computed_in_32_bits() -> None:
    model = nn.Linear(6, CLASSES)

    def step(modules: Any, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        return nn.CTCLoss()(modules["model"](x).log_softmax(-1), *rest)

    inputs = [torch.randn(TIME, BATCH, 6), targets, input_lengths, target_lengths]
    parity = train_both(step, {"model": model}, inputs, autocast=torch.bfloat16)
    names = {step.name for step in parity.graph.program.instructions}
    assert {"polyaccel.ctc_loss.default", "polyaccel.ctc_loss_backward.default"} <= names
    assert parity.loss < 2e-3
    assert parity.grads < 2e-2


def test_the_gaussian_loss_floors_its_variance_and_marks_a_negative_one() -> None:
    mean, target = torch.randn(4, 3), torch.randn(4, 3)

    def losses(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        first = F.gaussian_nll_loss(t, t + 1, x.abs(), full=True)
        return first + F.gaussian_nll_loss(x, t, torch.ones(4), reduction="none")

    agree(losses, mean, target)
    inputs = [mean, target, torch.tensor([1.0, -1.0, 1.0])]  # torch itself refuses the second
    graph = capture_forward(
        lambda x, t, var: [F.gaussian_nll_loss(x, t, var.expand(4, 3), reduction="none")],
        {},
        specs_of(inputs),
        autocast=None,
    )
    with exact_dtypes():
        (losses,), _ = run_forward(graph, {}, {}, arrays_of(inputs), jax.random.key(0))
    assert np.isnan(losses).tolist() == [[False, True, False]] * 4


def test_one_hot_needs_the_number_of_classes() -> None:
    labels = torch.tensor([0, 2, 1])
    agree(lambda x, y: x * F.one_hot(y, 4), torch.randn(3, 4), labels)
    with pytest.raises(PrepareError, match=r"(?s)result of one_hot depends on values.*num_classes=10"):
        agree(lambda x, y: x * F.one_hot(y), torch.randn(3, 3), labels)


def test_combinations_and_covariances() -> None:
    x = torch.randn(3, 6)
    agree(lambda x: torch.combinations(x[0], 3), x)
    agree(lambda x: torch.cov(x, aweights=torch.rand(6).detach() * 0 + torch.arange(1.0, 7.0)), x)
    agree(torch.corrcoef, x)
