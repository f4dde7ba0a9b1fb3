"""`accelerator.backward(loss, retain_graph=True)`: a second backward through the same graph, on torch and on jax."""

import pytest
import torch

from polyaccel import Accelerator
from polyaccel.errors import UnsupportedError


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_losses_of_one_forward_have_their_gradients_added(backend):
    torch.manual_seed(0)
    plain = torch.nn.Linear(3, 2)
    x = torch.randn(8, 3)
    accelerator = Accelerator(backend=backend, mesh={"data": 1} if backend == "torch" else None, cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    with torch.no_grad():
        for mine, other in zip(model.parameters(), plain.parameters()):
            mine.copy_(other)
    outputs = model(x)
    accelerator.backward(outputs.pow(2).mean(), retain_graph=True)
    accelerator.backward(outputs.abs().mean())
    expected = plain(x)
    (expected.pow(2).mean() + expected.abs().mean()).backward()
    for mine, other in zip(model.parameters(), plain.parameters()):
        # Two float32 sums in another order.
        torch.testing.assert_close(mine.grad.detach().cpu(), other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_keywords_of_torchs_backward_are_refused_by_name(backend):
    accelerator = Accelerator(backend=backend, cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    loss = model(torch.randn(8, 3)).mean()
    with pytest.raises(UnsupportedError, match=r"takes retain_graph only, and got create_graph="):
        accelerator.backward(loss, create_graph=True)
