"""The backwards of layer norm and gelu stay one operation each, and compute what PyTorch's do; 16-bit ones are taken apart and widened."""

from __future__ import annotations

import pytest
import torch
from captured_parity import train_both
from torch import nn

WHOLE = {"aten.native_layer_norm_backward.default", "aten.gelu_backward.default"}


class Layer(nn.Module):
    """Linear, layer norm over `dims`, both gelus: (..., 8) -> (..., 8)."""

    def __init__(self, dims: tuple[int, ...], *, has_weight: bool, has_bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(dims, elementwise_affine=has_weight, bias=has_bias)
        self.by_tanh, self.by_erf = nn.GELU("tanh"), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.by_erf(3 * self.by_tanh(self.norm(self.linear(x))))


def squares(modules, x):
    return modules["m"](x).float().square().sum()


@pytest.mark.parametrize(
    ("shape", "dims", "has_weight", "has_bias", "dtype", "tolerance"),
    [
        ((3, 5, 8), (8,), True, True, torch.float32, 1e-5),  # float32 sums in another order
        ((3, 5, 8), (5, 8), True, True, torch.float32, 1e-5),
        ((3, 5, 8), (8,), False, False, torch.float32, 1e-5),
        ((3, 8), (8,), True, False, torch.float64, 1e-14),
        ((8,), (8,), True, True, torch.float32, 1e-5),
        ((0, 8), (8,), True, True, torch.float32, 0.0),
    ],
)
def test_layer_norm_and_gelu_backwards_are_whole_and_agree(shape, dims, has_weight, has_bias, dtype, tolerance):
    torch.manual_seed(0)
    model = Layer(dims, has_weight=has_weight, has_bias=has_bias).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    parity = train_both(squares, {"m": model}, [torch.randn(shape, dtype=dtype)])
    assert {step.name for step in parity.graph.program.instructions} >= WHOLE
    assert parity.worst <= tolerance


def test_sixteen_bit_backwards_are_widened_as_pytorch_does():
    torch.manual_seed(0)
    model = Layer((8,), has_weight=True, has_bias=True).bfloat16()
    parity = train_both(squares, {"m": model}, [torch.randn(3, 5, 8, dtype=torch.bfloat16)])
    assert not {step.name for step in parity.graph.program.instructions} & WHOLE
    assert parity.worst < 2e-2  # bfloat16 has 8 bits: a few roundings
