"""Dropout of every kind: masks differ by step, layer and data shard, agree in forward and backward, and follow set_seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import on_jax
from torch import nn

from polyaccel.utils import set_seed

torch.set_num_threads(1)


def dropped(module: nn.Module, shape: tuple[int, ...], num_devices: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What a scaled dropout gives for ones, and the gradient of its sum by the scale: equal where both see one mask."""
    acc = on_jax(num_devices=num_devices)
    scale = nn.Parameter(torch.ones(shape))
    model = nn.ParameterList([scale])

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales, self.drop = model, module

        def forward(self, x):
            return self.drop(x * self.scales[0])

    prepared = acc.prepare(Scaled())
    out = prepared(torch.ones(shape))
    acc.backward(out.sum())
    return out.detach().clone(), scale.grad.clone()


@pytest.mark.parametrize(
    ("module", "shape", "num_kept_values"),
    [
        (nn.Dropout(0.25), (64, 64), 1),
        (nn.Dropout1d(0.25), (64, 64, 2), 1),
        (nn.Dropout2d(0.25), (32, 64, 2, 2), 1),
        (nn.Dropout3d(0.25), (32, 64, 1, 2, 1), 1),
        (nn.AlphaDropout(0.25), (64, 64), 2),
        (nn.FeatureAlphaDropout(0.25), (64, 64, 2, 2), 2),
        (nn.RReLU(0.1, 0.4), (8, 8), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forward_and_backward_see_one_mask(module, shape, num_kept_values):
    out, grad = dropped(module, shape)
    if isinstance(module, nn.RReLU):
        assert torch.equal(out, torch.ones(shape))
        return
    assert len(out.unique()) == 2
    kept = out == out.max()
    share = kept.float().mean().item()
    assert share == pytest.approx(0.75, abs=0.05)
    assert torch.equal(grad != 0, kept)
    torch.testing.assert_close(grad[kept].unique(), grad.max().reshape(1))
    if num_kept_values == 1:
        torch.testing.assert_close(out.max(), torch.tensor(1 / 0.75))
    if out.dim() > 2:  # whole channels go
        flat = kept.flatten(2)
        assert torch.equal(flat.any(-1), flat.all(-1))


class TwoMasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x):
        ones = torch.ones_like(x) + 0 * self.layer.weight.sum()
        return torch.stack([self.first(ones), self.second(ones), F.dropout(ones, 0.5, self.training)])


def masks(acc, model, num: int = 2) -> list[torch.Tensor]:
    return [model(torch.ones(64, 8)).detach().clone() for _ in range(num)]


def test_every_layer_and_every_step_draws_its_own_mask():
    acc = on_jax()
    model = acc.prepare(TwoMasks())
    first, second = masks(acc, model)
    seen = [*first, *second]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert 0.3 < (a != b).float().mean().item() < 0.7


@pytest.mark.parametrize("form", ["loop", "function", "fused"])
def test_set_seed_repeats_the_masks_of_a_run(form):
    def losses():
        acc = on_jax()
        set_seed(7)
        model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
        model, opt = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        acc_step = acc.train_step(lambda m, x: m(x).pow(2).mean(), model, opt) if form == "fused" else None
        x, found = torch.ones(8, 4), []
        for _ in range(3):
            if acc_step is not None:
                found.append(float(acc_step(x)))
                continue
            loss = (
                acc.backward(lambda m, x: m(x).pow(2).mean(), model, x)
                if form == "function"
                else model(x).pow(2).mean()
            )
            if form == "loop":
                acc.backward(loss)
            found.append(loss.item())
        return found

    one, two = losses(), losses()
    assert one == two
    assert len(set(one)) == 3


@pytest.mark.parametrize("form", ["loop", "function"])
def test_data_shards_draw_their_own_masks(form):
    acc = on_jax(num_devices=4)
    model = acc.prepare(nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5)))

    def loss_fn(model, x):
        out = model(x)
        return out.sum(), {"out": out}

    x = torch.ones(4, 1)
    out = acc.backward(loss_fn, model, x)[1]["out"] if form == "function" else model(x)
    rows = out.detach() != 0
    assert all(not torch.equal(rows[a], rows[b]) for a in range(4) for b in range(a))


def test_attention_dropout_is_drawn_inside_the_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Linear(4, 4)

        def forward(self, x):  # (batch, heads, time, size): attention of equal keys is a mean of the values
            return F.scaled_dot_product_attention(x, x, self.value(x), dropout_p=0.5 if self.training else 0.0)

    acc = on_jax()
    model = acc.prepare(Attention())
    x = torch.ones(2, 2, 16, 4)
    one, two = model(x).detach().clone(), model(x).detach().clone()
    assert not torch.equal(one, two)
    rows = one[0, 0, :, 0]
    assert len(rows.unique()) > 2  # every query has a mask of its own
    model.eval()
    with torch.no_grad():
        assert len(model(x)[0, 0, :, 0].unique()) == 1


def test_evaluation_draws_nothing():
    acc = on_jax()
    model = acc.prepare(TwoMasks())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(torch.ones(4, 8)), torch.ones(3, 4, 8))
