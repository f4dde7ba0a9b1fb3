"""LayerNorm and GroupNorm: torch's numbers, by operations that the partitioner cuts."""

import pytest
import torch
import torch_xla
from torch.nn import functional as F

LAYER = (lambda x, w, b: F.layer_norm(x, (6, 4), w, b, eps=1e-3), (8, 6, 4), (6, 4))
GROUP = (lambda x, w, b: F.group_norm(x, 3, w, b, eps=1e-3), (8, 6, 5, 2), (6,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("case", [LAYER, GROUP], ids=["layer", "group"])
def test_values_and_gradients_are_torchs_and_no_batch_norm_is_traced(case, has_scale, dtype):
    function, shape, of_scale = case
    torch.manual_seed(0)
    values = [3 + 2 * torch.randn(shape), torch.randn(of_scale), torch.randn(of_scale)]
    weights = torch.randn(shape).to(dtype)
    found = []
    for device in ("cpu", torch_xla.device()):
        x, w, b = (value.to(device, dtype, copy=True).requires_grad_() for value in values)
        y = function(x, w if has_scale else None, b if has_scale else None)
        assert y.dtype == dtype
        (y * weights.to(device)).sum().backward()
        gradients = [tensor.grad for tensor in ((x, w, b) if has_scale else (x,))]
        if device != "cpu":
            traced = torch_xla._XLAC._get_xla_tensors_text([y, *gradients])
            assert "batch_norm" not in traced  # which would be computed whole on every device
        found.append([y.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, **tolerance)


def test_evaluation_takes_the_same_way_and_inference_mode_gives_the_same_numbers():
    x = torch.randn(4, 6)
    expected = F.layer_norm(x, (6,))
    with torch.no_grad():
        y = F.layer_norm(x.to(torch_xla.device()), (6,))
        assert "batch_norm" not in torch_xla._XLAC._get_xla_tensors_text([y])
        torch.testing.assert_close(y.cpu(), expected)
    with torch.inference_mode():
        torch.testing.assert_close(F.layer_norm(x.to(torch_xla.device()), (6,)).cpu(), expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: F.layer_norm(x, (3,)), r"shape \(3,\) was given an input of shape \(4, 6\)"),
        (lambda x: F.layer_norm(x, (6,), x[0, :1]), r"given a weight of shape \(1,\)"),
        (lambda x: F.group_norm(x, 3, None, x[0, :3]), r"6 channels was given a bias of shape \(3,\)"),
        (lambda x: torch.group_norm(x, 4), r"4 groups was given an input of shape \(4, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_raise_as_on_other_devices(call, said):
    with pytest.raises(RuntimeError):
        call(torch.ones(4, 6))
    with pytest.raises(RuntimeError, match=said):
        call(torch.ones(4, 6).to(torch_xla.device()))
