"""Where a recording cannot follow, PyTorch computes the user's part: the same numbers, nothing captured twice, and said once."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from loop_scripts import Net, batches, num_compiles, sgd, trained
from torch import nn

from polyaccel.errors import PrepareError

torch.set_num_threads(1)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x.abs()


def squares(x):
    return (x * x).mean()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # users still have such losses
    scripted = torch.jit.script(squares)


def selected(step, model, x, y):
    out, keep = model(x), y > 0
    return F.cross_entropy(out[keep], y[keep]) + out.masked_select(out.detach() > 0).sum() * 0.1


def hard_examples(step, model, x, y):
    losses = F.cross_entropy(model(x), y, reduction="none")
    return losses[losses > losses.mean()].mean() + losses.mean()


def written(step, model, x, y):
    buffer, out = torch.zeros(16, 3), model(x)
    buffer[::2] = out
    buffer[1::2] = out * 2
    return F.cross_entropy(buffer, y.repeat_interleave(2))


def custom(step, model, x, y):
    return F.cross_entropy(Tripled.apply(Tripled.apply(model(x))), y) + Tripled.apply(model(x).mean())


def compiled(step, model, x, y):
    out = model(x)
    return F.cross_entropy(out, y) + scripted(out)


def mapped(step, model, x, y):
    return torch.vmap(lambda row: (row * row).sum())(model(x)).mean()


def with_parameters(step, model, x, y):
    out = model(x)
    return out[out.detach() > 0].sum() * model.head.weight.norm() + model.body.bias[model.body.bias > 0].sum()


@pytest.mark.parametrize(
    ("loss_of", "reason"),
    [
        (selected, "depends on values"),
        (hard_examples, "depends on values"),
        (written, "no part of the recording"),
        (custom, "Tripled has a backward of its own"),
        (compiled, "cannot be looked into"),
        (mapped, "cannot be looked into"),
        (with_parameters, "depends on values"),
    ],
)
def test_what_a_recording_cannot_follow_has_the_gradients_of_torch(loss_of, reason, caplog):
    with caplog.at_level(logging.WARNING, logger="polyaccel_bridges.halves"):
        assert_same_on_jax(lambda acc: trained(acc, loss_of))
    said = [record.getMessage() for record in caplog.records if "computed by PyTorch" in record.getMessage()]
    assert any(reason in text for text in said)
    lines = [text.split(": ")[0] for text in said]
    assert all(__file__ in line for line in lines)
    assert len(lines) == len(set(lines))  # once per line of user code, not once per step


def test_the_halves_are_compiled_once():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        counts = []
        for x, y in batches(5):
            acc.backward(hard_examples(0, model, x, y))
            optimizer.step()
            optimizer.zero_grad()
            counts.append(num_compiles(acc))
        assert counts[1] == counts[-1]
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_backward_of_the_loss_itself_works_too():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        for x, y in batches(3):
            out = model(x)
            (out[y > 0].pow(2).mean() + Tripled.apply(out).sum() * 0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_value_that_was_read_before_keeps_the_backward_of_a_custom_function():
    def loss_of(step, model, x, y):
        out = Tripled.apply(model(x))
        out.sum().item()
        return F.cross_entropy(out, y) + model(x).pow(2).mean()

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_dropout_is_the_same_in_both_halves():
    acc = on_jax()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False))
    model, _ = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    out = model(torch.ones(1, 64))
    weight = model.module[1].weight.detach().clone()
    acc.backward(out[out != 0].sum())
    assert (model.module[1].weight.grad * weight).sum().item() == pytest.approx(out.item(), abs=1e-5)


def test_several_data_shards_agree():
    assert_same_on_jax(lambda acc: trained(acc, hard_examples, steps=2), num_devices=4)


def test_gradients_accumulate_over_both_paths():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        for x, y in batches(3):
            acc.backward(F.cross_entropy(model(x), y) / 2)
            acc.backward(selected(0, model, x, y) / 2)
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_arguments_that_change_at_every_step_are_not_compiled_for_ever():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        counts = []
        for step in range(24):
            x, _ = batches(1, 30)[0]
            acc.backward(model(x)[step : step + 3].pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
            counts.append(num_compiles(acc))
        assert counts[-1] == counts[12]
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_second_backward_fails_as_in_torch():
    acc = on_jax()
    model = acc.prepare(Net())
    out = model(torch.randn(4, 6))
    loss = out[out.detach() > 0].sum()
    acc.backward(loss)
    with pytest.raises(RuntimeError, match="a second time"):
        acc.backward(loss)
    with pytest.raises(RuntimeError, match="a second time"):
        out[out.detach() > 0].sum()


def test_a_foreign_parameter_is_refused_there_too():
    acc = on_jax()
    model = acc.prepare(Net())
    temperature = nn.Parameter(torch.ones(()))
    out = model(torch.randn(4, 6))
    loss = out[out.detach() > 0].sum() * temperature
    with pytest.raises(PrepareError, match="belongs to no prepared model"):
        acc.backward(loss)


def test_what_plain_torch_computed_cannot_go_into_a_model_with_gradients():
    acc = on_jax()
    model = acc.prepare(nn.Linear(6, 6))
    out = model(torch.randn(4, 6))
    part = out[out.detach().sum(1) > 0]
    with pytest.raises(PrepareError, match="gradients would stop there"):
        model(part)
