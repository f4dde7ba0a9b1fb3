"""Aliases, writes and values that outlive a step: what a recorded loop sees is what torch sees."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from loop_scripts import Net, batches, num_compiles, sgd, trained
from torch import nn

from polyaccel_bridges.tensors import DeviceTensor

torch.set_num_threads(1)


def test_totals_in_a_list_are_the_very_tensors_that_were_added_to():
    def script(acc):
        meters = [torch.zeros(()), torch.zeros(3), torch.zeros(2, 3)]
        row = meters[2][0]

        def loss_of(step, model, x, y):
            out = model(x)
            for meter, value in zip(meters, (out.detach().mean(), out.detach().sum(0)), strict=False):
                meter += value
            row.add_(out.detach()[0])  # a view: its base changes with it
            return F.cross_entropy(out, y)

        return trained(acc, loss_of), meters

    assert_same_on_jax(script)


def test_losses_in_a_list_may_be_added_to_with_gradients():
    def loss_of(step, model, x, y):
        out = model(x)
        losses = [torch.zeros(()), torch.zeros(())]
        for loss in losses:
            loss += F.cross_entropy(out, y)
        losses[1] *= 0.5
        return sum(losses)

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_memory_shared_with_numpy_is_written():
    def script(acc):
        total = torch.zeros(3)
        seen = total.numpy()

        def loss_of(step, model, x, y):
            out = model(x)
            total.add_(out.detach().sum(0))
            return F.cross_entropy(out, y)

        trained(acc, loss_of, steps=2)
        return torch.from_numpy(seen.copy()), total

    assert_same_on_jax(script)


def test_batches_may_be_written_between_their_uses():
    def loss_of(step, model, x, y):
        with torch.no_grad():
            first = model(x.clone())
        x.add_(0.5)
        second = model(x.clone())
        x.mul_(0.1)
        y.fill_(step % 3)
        return F.cross_entropy(second + first, y) + (second.mean(-1) * x.sum(-1)).mean()

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_a_write_after_an_early_read_counts():
    def loss_of(step, model, x, y):
        out = model(x) * 1
        out.sum().item()
        with torch.no_grad():
            out.mul_(2)
        seen = out.sum().item()
        out = out + 0 * seen
        detached = model(x).detach()
        before = detached.sum() * 1
        before.item()
        detached.mul_(3)
        return F.cross_entropy(out, y) + (detached * out).mean() + before * out.mean()

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_the_same_tensor_twice_and_two_equal_ones_are_told_apart():
    def loss_of(step, model, x, y):
        first = torch.rand(8)
        second = first if step % 2 else torch.rand(8)
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (losses * first * second).sum()

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_criteria_with_state_of_their_own():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(1, 3))
            self.written = torch.zeros(1, 3)

        def forward(self, out, y):
            loss = F.cross_entropy(out - self.center - self.written, y)
            with torch.no_grad():
                self.center = self.center * 0.9 + out.mean(0, keepdim=True) * 0.1
                self.written.mul_(0.9).add_(out.mean(0, keepdim=True), alpha=0.1)
            return loss

    def script(acc):
        criterion = Centered()
        return trained(acc, lambda step, m, x, y: criterion(m(x), y)), criterion.center, criterion.written

    assert_same_on_jax(script)


def test_losses_that_are_kept_do_not_keep_their_steps():
    acc = on_jax()
    model = Net()
    model, optimizer = acc.prepare(model, sgd(model))
    kept = []

    def run(steps):
        for x, y in batches(steps):
            out = model(x)
            loss = F.cross_entropy(out, y)
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            kept.extend([loss, out, loss.detach()])
        gc.collect()
        recorder = kept[0]._recorder
        return (
            sum(type(found) is DeviceTensor for found in gc.get_objects()),
            len(recorder._closed),
            num_compiles(acc),
        )

    first, second = run(3), run(10)
    assert second[0] - first[0] == 30  # what is kept, and nothing else
    assert second[1:] == first[1:]
    assert all(tensor._ref is None for tensor in kept)


def test_exceptions_in_a_step_leave_nothing_behind():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        failed = []
        for step, (x, y) in enumerate(batches(5)):
            try:
                out = model(x)
                if step == 1:
                    raise ValueError("the user's own")
                if step == 2:
                    out + torch.randn(7)
                loss = F.cross_entropy(out, y)
                if step == 3:
                    model(torch.randn(2, 5))
                acc.backward(loss)
                optimizer.step()
            except (ValueError, RuntimeError):
                failed.append(step)
            finally:
                optimizer.zero_grad()
        return failed, dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_break_before_backward_and_a_branch_on_a_value():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        kept = []
        for _ in range(2):
            for step, (x, y) in enumerate(batches(3)):
                loss = F.cross_entropy(model(x), y)
                if step == 2:
                    break
                if loss.item() > 1.1:
                    loss = loss * 2 + model(x).mean()
                elif step % 2:
                    loss = loss.sqrt()
                acc.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            kept.append(loss.detach())
        return kept, dict(model.state_dict())

    assert_same_on_jax(script)


def test_evaluation_is_captured_once_per_mode_and_signature():
    acc = on_jax()
    model = Net(dropout=0.5)
    model, optimizer = acc.prepare(model, sgd(model))
    counts = []
    for x, y in batches(4):
        model.train()
        acc.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            first = (model(x).argmax(-1) == y).float().mean().item()
            assert F.cross_entropy(model(x[:4]), y[:4]).item() > 0
            assert first == (model(x).argmax(-1) == y).float().mean().item()  # no dropout
        counts.append(num_compiles(acc))
    assert counts[0] == counts[-1]


def test_random_operations_in_the_loss_draw_anew_at_every_step():
    acc = on_jax()
    model, optimizer = (model := nn.Linear(6, 64, bias=False)), torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = acc.prepare(model, optimizer)
    x = torch.ones(1, 6)
    zeros = []
    for _ in range(3):
        out = F.dropout(model(x), 0.5)
        early = (out == 0).sum().item()
        acc.backward(out.sum())
        grad = model.weight.grad[:, 0].clone()
        optimizer.zero_grad()
        assert early == (grad == 0).sum().item() == (out == 0).sum().item()
        zeros.append(grad)
    assert not torch.equal(zeros[0], zeros[1])
    assert not torch.equal(zeros[1], zeros[2])


def test_an_object_among_the_arguments_of_a_model_may_change():
    class Settings:
        scale = 1.0

    class Scaled(Net):
        def forward(self, x, settings):
            return super().forward(x) * settings.scale

    def script(acc):
        settings = Settings()

        def loss_of(step, model, x, y):
            settings.scale = 1.0 + step
            return F.cross_entropy(model(x, settings), y)

        return trained(acc, loss_of, model=Scaled())

    assert_same_on_jax(script)


def test_printing_and_converting_outputs():
    def script(acc):
        seen = []

        def loss_of(step, model, x, y):
            out = model(x)
            seen.append([out.detach().cpu().numpy().sum().item(), out.tolist(), out[0, 1].item(), out.max().item()])
            assert str(out).startswith("tensor(")
            assert f"{out.mean():.3f}" == f"{out.mean().item():.3f}"
            return out.gather(1, y[:, None]).neg().mean() + out[torch.arange(8), y].logsumexp(0)

        return trained(acc, loss_of, steps=2), seen

    assert_same_on_jax(script)


def test_a_written_value_carries_its_gradient_into_a_frozen_model():
    def script(acc):
        judge = acc.prepare(nn.Linear(3, 1).requires_grad_(False))

        def loss_of(step, model, x, y):
            out = model(x)
            kept = out.detach() * 0
            kept[2:] = out[2:]
            return judge(kept).pow(2).mean() + judge(out[:1]).sum()

        return trained(acc, loss_of, steps=2)

    assert_same_on_jax(script)


def test_what_a_write_needs_of_torch_is_still_refused():
    acc = on_jax()
    model = acc.prepare(Net())
    with pytest.raises(RuntimeError, match="leaf Variable"):
        model.head.weight.add_(model(torch.randn(2, 6)).sum())
