"""Gradients in an unmodified loop: backward in all its forms, and user code that looks at them or changes them before the step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from loop_scripts import Net, batches, num_compiles, sgd, trained
from torch import nn

from polyaccel.errors import UnsupportedError

torch.set_num_threads(1)


def loss_of(step, model, x, y):
    return F.cross_entropy(model(x), y)


def test_gradients_may_be_changed_in_every_way_before_the_step():
    def change(step, model):
        params = list(model.parameters())
        if step == 0:
            for p in params:
                p.grad.mul_(0.5)
        elif step == 1:
            params[0].grad = torch.ones_like(params[0]) * 0.1
            params[1].grad = None
        elif step == 2:
            params[2].grad.zero_()
        elif step == 3:
            norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in params))
            for p in params:
                p.grad.mul_(0.1 / (norm + 1e-6))
        elif step == 4:
            for p in params:
                p.grad += 0.01 * p
                p.grad.add_(torch.ones_like(p), alpha=0.1)
                p.grad.data.clamp_(-0.1, 0.1)
        else:
            for p in params:
                p.grad = p.grad * 2

    assert_same_on_jax(lambda acc: trained(acc, loss_of, steps=6, after_backward=change))


def test_gradients_may_be_looked_at():
    def script(acc):
        seen = []

        def look(step, model):
            grads = [p.grad for p in model.parameters()]
            seen.append([grad.norm().item() for grad in grads])
            seen.append([torch.histc(grads[0], 4), torch.stack([grad.abs().max() for grad in grads]).max()])
            seen.append(torch.cat([grad.flatten() for grad in grads]).mean())

        return trained(acc, loss_of, steps=2, after_backward=look), seen

    assert_same_on_jax(script)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_may_stand_anywhere(set_to_none):
    def script(acc):
        found = []
        for place in range(5):
            torch.manual_seed(1)
            model = Net()
            model, optimizer = acc.prepare(model, sgd(model))
            for x, y in batches(3):
                if place == 0:
                    optimizer.zero_grad(set_to_none=set_to_none)
                out = model(x)
                if place == 1:
                    optimizer.zero_grad(set_to_none=set_to_none)
                loss = F.cross_entropy(out, y)
                if place == 2:
                    model.zero_grad(set_to_none=set_to_none)
                acc.backward(loss)
                if place == 3:
                    optimizer.zero_grad(set_to_none=set_to_none)
                optimizer.step()
                if place == 4:
                    optimizer.zero_grad(set_to_none=set_to_none)
            found.append([dict(model.state_dict()), [p.grad for p in model.parameters()]])
        return found

    assert_same_on_jax(script)


def test_backward_takes_the_arguments_of_torch():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        for x, y in batches(3):
            out = model(x)
            loss = F.cross_entropy(out, y)
            loss.backward(retain_graph=True)
            loss.backward()
            F.cross_entropy(model(x), y).backward(torch.tensor(0.5))
            model(x).backward(gradient=torch.full((8, 3), 0.1))
            out = model(x)
            torch.autograd.backward([F.cross_entropy(out, y), out.pow(2).mean()])
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_backward_that_would_need_the_graph_of_the_gradients_is_refused():
    acc = on_jax()
    model = acc.prepare(Net())
    loss = model(torch.randn(2, 6)).sum()
    with pytest.raises(UnsupportedError, match="create_graph"):
        loss.backward(create_graph=True)
    with pytest.raises(UnsupportedError, match="inputs"):
        loss.backward(inputs=list(model.parameters()))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        loss.backward(torch.ones(3))


def test_several_backwards_before_one_step_add_up():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        seen = []
        for x, y in batches(3):
            first = F.cross_entropy(model(x), y) / 2
            acc.backward(first)
            second = model(x).pow(2).mean() / 2
            acc.backward(second)
            optimizer.step()
            optimizer.zero_grad()
            seen += [first.item(), second.item()]
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_two_optimizers_and_two_models_take_turns():
    def script(acc):
        generator, critic = nn.Linear(4, 6), Net()
        generator, critic, first, second = acc.prepare(
            generator,
            critic,
            torch.optim.Adam(generator.parameters(), lr=0.01),
            torch.optim.Adam(critic.parameters(), lr=0.01),
        )
        seen = []
        for x, _ in batches(3):
            fake = generator(torch.randn(8, 4))
            loss = F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean()
            second.zero_grad()
            acc.backward(loss)
            second.step()
            other = F.softplus(-critic(fake)).mean()
            first.zero_grad()
            acc.backward(other)
            first.step()
            seen += [loss.item(), other.item()]
        return seen, dict(generator.state_dict()), dict(critic.state_dict())

    assert_same_on_jax(script)


def test_one_model_may_have_two_optimizers():
    def script(acc):
        model = Net()
        model, first, second = acc.prepare(
            model, torch.optim.SGD(model.body.parameters(), lr=0.1), torch.optim.Adam(model.head.parameters(), lr=0.01)
        )
        for step, (x, y) in enumerate(batches(4)):
            acc.backward(F.cross_entropy(model(x), y))
            first.step()
            if step % 2:
                second.step()
                second.zero_grad()
            first.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_freezing_between_steps_and_between_forward_and_backward():
    def script(acc):
        model = Net()
        model, optimizer = acc.prepare(model, sgd(model))
        seen = []
        for step, (x, y) in enumerate(batches(4)):
            model.body.requires_grad_(step % 2 == 0)
            loss = F.cross_entropy(model(x), y) + model.body.weight.pow(2).sum() * 0.01
            acc.backward(loss + model.head.weight.pow(2).sum() * 0.01)
            seen.append([p.grad is None for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_weight_average_by_hand_and_a_penalty_over_all_parameters():
    def script(acc):
        import copy

        model = Net()
        average = copy.deepcopy(model)
        model, optimizer = acc.prepare(model, sgd(model))
        counts = []
        for x, y in batches(4):
            penalty = sum(p.pow(2).sum() for p in model.parameters())
            acc.backward(F.cross_entropy(model(x), y) + 1e-2 * penalty)
            optimizer.step()
            optimizer.zero_grad()
            counts.append(num_compiles(acc))
            with torch.no_grad():
                for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                    mean.mul_(0.9).add_(p, alpha=0.1)
        assert counts[0] == counts[-1]
        return dict(average.state_dict())

    assert_same_on_jax(script)
