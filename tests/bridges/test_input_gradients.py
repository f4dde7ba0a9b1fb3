"""Gradients with respect to inputs: adversarial training, torch.autograd.grad on values of the loop, and arguments of loss functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import PlainTorch, assert_same_on_jax, on_jax, run
from loop_scripts import Net, batches, sgd
from torch import nn

from polyaccel.errors import PrepareError, UnsupportedError

torch.set_num_threads(1)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_adversarial_training_by_the_sign_of_the_inputs_gradient(num_devices):
    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        seen = []
        for x, y in batches(3):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y)
            acc.backward(loss)
            seen.append(x.grad.clone())
            optimizer.zero_grad()
            harder = (x + 0.1 * x.grad.sign()).detach()
            acc.backward(F.cross_entropy(model(harder), y))
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script, num_devices=num_devices)


def test_a_perturbation_that_is_added_outside_of_the_model_gets_its_gradient():
    def script(acc):
        model = acc.prepare(Net().requires_grad_(False))
        x, y = batches(1)[0]
        delta = torch.zeros(6, requires_grad=True)
        scale = torch.ones((), requires_grad=True)
        seen = []
        for _ in range(3):  # torch adds to .grad, and so does this
            acc.backward(F.cross_entropy(model(x + delta) * scale, y))
            seen += [delta.grad.clone(), scale.grad.clone()]
            delta.data -= 0.1 * delta.grad
        return seen

    assert_same_on_jax(script)


def test_one_input_of_two_models_and_of_the_loss_gets_the_sum():
    def script(acc):
        one, two = acc.prepare(Net(), Net())
        x = batches(1)[0][0].requires_grad_()
        loss = (one(x) * two(x)).sum() + (one(x).mean() * x).pow(2).sum()
        acc.backward(loss)
        return x.grad, one.head.weight.grad

    assert_same_on_jax(script, atol=1e-5)


def test_the_accumulation_scale_reaches_inputs_too():
    acc = on_jax(gradient_accumulation_steps=4)
    model = acc.prepare(Net())
    x, y = batches(1)[0]
    whole, part = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(model(whole), y).backward()  # torch's own call does not divide
    with acc.accumulate(model):
        acc.backward(F.cross_entropy(model(part), y))
    torch.testing.assert_close(part.grad * 4, whole.grad)


def test_inputs_without_gradient_and_evaluation_are_left_alone():
    acc = on_jax()
    model = acc.prepare(Net())
    x, y = batches(1)[0]
    x.requires_grad_()
    with torch.no_grad():
        model(x).sum().item()
    acc.backward(F.cross_entropy(model(x.detach()), y))
    assert x.grad is None


def test_autograd_grad_by_parameters_and_inputs_in_the_loop():
    def script(acc):
        model = acc.prepare(Net())
        seen = []
        for x, y in batches(2):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y)
            seen += torch.autograd.grad(loss, [x, model.head.weight, *model.body.parameters()], retain_graph=True)
            assert x.grad is None
            assert model.head.weight.grad is None
            acc.backward(loss)
            seen += [x.grad, model.head.weight.grad.clone()]
            model.zero_grad()
        out = model(x)
        seen += torch.autograd.grad(out, x, grad_outputs=torch.ones_like(out) * 0.5)
        (by_delta,) = torch.autograd.grad(model(x * 2).sum(), x)
        return [*seen, by_delta]

    assert_same_on_jax(script)


def test_autograd_grad_speaks_as_torch_does():
    acc = on_jax()
    model, other = acc.prepare(Net(), Net())
    x, y = batches(1)[0]
    loss = F.cross_entropy(model(x), y)
    assert torch.autograd.grad(loss, other.head.weight, allow_unused=True, retain_graph=True) == (None,)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(loss, other.head.weight, retain_graph=True)
    torch.autograd.grad(loss, model.head.weight)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, model.head.weight)
    out = model(x)
    with pytest.raises(UnsupportedError, match="that a prepared model computed"):
        torch.autograd.grad(out.sum(), out)
    with pytest.raises(UnsupportedError, match="create_graph"):
        torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)


def test_parameters_that_nobody_prepared_are_still_refused():
    model = on_jax().prepare(Net())
    weight = nn.Parameter(torch.ones(6))
    with pytest.raises(PrepareError, match="belongs to no prepared model"):
        model(torch.randn(4, 6) * weight)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_argument_of_a_loss_function_gets_its_gradient(num_devices):
    def loss_fn(model, x, y, strength):
        return F.cross_entropy(model(x), y) + strength * x.pow(2).mean()

    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        strength = torch.tensor(0.5, requires_grad=True)
        seen = []
        for x, y in batches(2):
            x.requires_grad_()
            acc.backward(loss_fn, model, x * 2 if len(seen) > 1 else x, y, strength)
            optimizer.step()
            optimizer.zero_grad()
            seen += [x.grad, strength.grad.clone()]
        return seen, dict(model.state_dict())

    assert_same_on_jax(script, num_devices=num_devices)


def test_a_gradient_penalty_as_a_function_equals_torchs():
    def critic_loss(model, real, fake):
        mix = (0.5 * real + 0.5 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(mix).sum(), mix, create_graph=True)
        return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        for (real, _), (fake, _) in zip(batches(2), batches(2), strict=True):
            acc.backward(critic_loss, model, real, fake)
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    torch.testing.assert_close(run(script, on_jax()), run(script, PlainTorch()), atol=1e-5, rtol=1e-4)
