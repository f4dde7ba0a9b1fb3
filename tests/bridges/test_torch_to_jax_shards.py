"""A torch loop over four data shards: the model sees each shard's samples, the user's own operations see the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from torch import nn

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 6) -> (batch, 3)
        return self.head(F.gelu(self.norm(self.body(x))))


def batches(num: int = 3, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, 6), torch.randint(0, 3, (size,))) for _ in range(num)]


def trained(acc, step, *, model=None, steps: int = 3):
    model = model or Net()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    seen = []
    for x, y in batches(steps):
        loss = step(model, x, y)
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return seen, dict(model.state_dict())


def on_four(script) -> None:
    assert_same_on_jax(script, num_devices=4)


def test_a_mean_over_the_batch_is_the_mean_over_all_shards():
    on_four(lambda acc: trained(acc, lambda model, x, y: F.cross_entropy(model(x), y)))


def test_code_that_knows_the_batch_size_stays_exact():
    def step(model, x, y):
        out = model(x)
        rows = out.view(x.size(0) * 3)
        return F.cross_entropy(out, y, reduction="sum") / x.size(0) + (rows.reshape(8, 3)[:4] - out[4:]).pow(2).sum()

    on_four(lambda acc: trained(acc, step))


def test_a_loss_computed_inside_the_model_is_averaged():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits, "classes": 3}

    def script(acc):
        model = WithLoss()
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        seen = []
        for x, y in batches():
            out = model(x, labels=y)
            assert out["classes"] == 3
            acc.backward(out["loss"])
            optimizer.step()
            optimizer.zero_grad()
            seen += [out["loss"].item(), out["logits"].argmax(-1)]
        return seen, dict(model.state_dict())

    on_four(script)


def test_class_weights_are_the_same_on_every_shard_even_when_they_are_as_many_as_samples():
    def script(acc):
        weight = torch.rand(8)
        model = nn.Linear(6, 8)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for x, y in batches():
            loss = F.cross_entropy(model(x), y, weight=weight)
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    on_four(script)


def test_values_read_early_and_several_forwards():
    def step(model, x, y):
        one = model(x)
        early = F.cross_entropy(one, y).item()
        two = model(x * 0.5)
        return F.cross_entropy(two, y) * early + (one - two).abs().mean()

    on_four(lambda acc: trained(acc, step))


def test_gradients_flow_through_one_model_into_another():
    def script(acc):
        encoder, head = nn.Linear(6, 6), Net()
        opt_e = torch.optim.SGD(encoder.parameters(), lr=0.1)
        opt_h = torch.optim.SGD(head.parameters(), lr=0.1)
        encoder, head, opt_e, opt_h = acc.prepare(encoder, head, opt_e, opt_h)
        for x, y in batches():
            hidden = torch.tanh(encoder(x)) * 1.5
            loss = F.cross_entropy(head(hidden), y) + hidden.pow(2).mean() * 0.1
            acc.backward(loss)
            for optimizer in (opt_e, opt_h):
                optimizer.step()
                optimizer.zero_grad()
        return dict(encoder.state_dict()), dict(head.state_dict())

    on_four(script)


def test_writes_to_outputs_before_another_model_is_called():
    def step(model, x, y):
        out = model(x)
        out[:, 0] += 1.0
        out.mul_(0.5)
        again = model(x + out.mean())
        return F.cross_entropy(out + again, y)

    on_four(lambda acc: trained(acc, step))


def test_evaluation_without_gradients_joins_the_shards():
    def script(acc):
        model = acc.prepare(Net())
        model.eval()
        out = []
        with torch.no_grad():
            for size in (8, 6, 4):  # 6 does not divide by four
                x = torch.randn(size, 6)
                logits = model(x)
                out += [logits, logits.argmax(-1), logits.shape[0]]
        return out

    on_four(script)


def test_the_loss_function_form_gives_the_same_numbers():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

        def loss_fn(model, batch):
            x, y = batch
            out = model(x)
            return F.cross_entropy(out, y), {"largest": out.amax(-1), "accuracy": (out.argmax(-1) == y).float().mean()}

        seen = []
        for batch in batches():
            seen.append(acc.backward(loss_fn, model, batch))
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    on_four(script)


def test_batch_norm_sees_its_own_shard_and_the_first_shards_statistics_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))
    weight = model[0].weight.detach().clone()
    acc = on_jax(num_devices=4)
    model = acc.prepare(model)
    x = torch.randn(16, 6)
    out = model(x)
    acc.backward(out.pow(2).mean() + out.sum() * 0)
    parts = [F.batch_norm(part @ weight.T, None, None, training=True) for part in x.chunk(4)]
    torch.testing.assert_close(
        out.detach().clone(), torch.cat(parts), atol=1e-5, rtol=1e-5
    )  # float32, other order of sums
    first = (x[:4] @ weight.T).mean(0) * 0.1
    torch.testing.assert_close(model.module[1].running_mean.clone(), first, atol=1e-6, rtol=1e-5)
    assert model.module[1].num_batches_tracked.item() == 1


def test_every_shard_draws_its_own_dropout_and_an_early_read_sees_the_same_masks():
    acc = on_jax(num_devices=4)
    torch.manual_seed(0)
    model = acc.prepare(nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 1, bias=False)))
    weight = model.module[1].weight.detach().clone()
    out = model(torch.ones(4, 32))
    early = out.detach().clone()
    assert len(set(early.flatten().tolist())) == 4
    acc.backward(out.sum())
    grad = model.module[1].weight.grad.clone()
    assert (grad * weight).sum().item() == pytest.approx(early.sum().item(), abs=1e-5)
