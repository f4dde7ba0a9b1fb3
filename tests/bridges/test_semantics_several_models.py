"""Several models and optimizers in one step: adversarial training, distillation, one optimizer for two models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax
from semantics import sgd
from torch import nn

torch.set_num_threads(1)


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 2, stride=2),
        nn.Tanh(),
    )


def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64, 1),
    )


@pytest.mark.parametrize("has_two_backwards", [True, False])
def test_a_dcgan_with_batch_norm_and_two_optimizers_trains(has_two_backwards):
    def script(acc):
        net_g, net_d = generator(), critic()
        adam_d = torch.optim.Adam(net_d.parameters(), lr=1e-2, betas=(0.5, 0.999))
        adam_g = torch.optim.Adam(net_g.parameters(), lr=1e-2, betas=(0.5, 0.999))
        net_g, net_d, adam_g, adam_d = acc.prepare(net_g, net_d, adam_g, adam_d)
        criterion = nn.BCEWithLogitsLoss()
        seen = []
        for _ in range(2):
            real, noise = torch.randn(4, 1, 4, 4), torch.randn(4, 3, 1, 1)
            net_d.zero_grad()
            err_real = criterion(net_d(real), torch.ones(4, 1))
            fake = net_g(noise)
            err_fake = criterion(net_d(fake.detach()), torch.zeros(4, 1))
            if has_two_backwards:
                acc.backward(err_real)
                acc.backward(err_fake)
            else:
                acc.backward(err_real + err_fake)
            adam_d.step()
            net_g.zero_grad()
            err_g = criterion(net_d(fake), torch.ones(4, 1))
            acc.backward(err_g)
            adam_g.step()
            seen += [err_real.item(), err_fake.item(), err_g.item()]
        return seen, dict(net_g.state_dict()), dict(net_d.state_dict())

    # Adam divides small gradients by their own size: a rounding of a gradient near 0 is a visible part of a step.
    assert_same_on_jax(script, atol=2e-4, rtol=1e-3)


def test_a_frozen_critic_is_switched_on_and_off():
    def script(acc):
        net_g, net_d = nn.Linear(3, 4), nn.Linear(4, 1)
        opt_g, opt_d = sgd(net_g), sgd(net_d)
        net_g, net_d, opt_g, opt_d = acc.prepare(net_g, net_d, opt_g, opt_d)
        for _ in range(3):
            fake = net_g(torch.randn(8, 3))
            net_d.requires_grad_(False)
            opt_g.zero_grad()
            acc.backward(net_d(fake).mean())
            opt_g.step()
            net_d.requires_grad_(True)
            opt_d.zero_grad()
            acc.backward(F.softplus(net_d(fake.detach())).mean() + F.softplus(-net_d(torch.randn(8, 4))).mean())
            opt_d.step()
        return dict(net_g.state_dict()), dict(net_d.state_dict())

    assert_same_on_jax(script)


def test_a_student_learns_from_a_frozen_teacher_and_from_an_average_of_itself():
    def script(acc):
        teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        average = copy.deepcopy(student)
        student, optimizer, teacher, average = acc.prepare(student, sgd(student), teacher, average)
        teacher.eval()
        average.eval()
        for _ in range(3):
            x = torch.randn(8, 4)
            with torch.no_grad():
                target = teacher(x).softmax(-1) + average(x).softmax(-1)
            out = student(x)
            acc.backward(F.kl_div(out.log_softmax(-1), target / 2, reduction="batchmean") + out.square().mean() * 0.1)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
                    mine.mul_(0.9).add_(theirs, alpha=0.1)
        return dict(student.state_dict()), dict(average.state_dict()), dict(teacher.state_dict())

    assert_same_on_jax(script)


@pytest.mark.parametrize("form", ["loop", "function"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=lambda m: m.__name__)
def test_one_optimizer_trains_two_models(make, form):
    def loss_fn(encoder, decoder, x):
        return (decoder(torch.tanh(encoder(x))) - x).square().mean()

    def script(acc):
        encoder, decoder = nn.Linear(4, 2), nn.Linear(2, 4)
        groups = [
            {"params": [encoder.weight, decoder.weight]},
            {"params": [encoder.bias, decoder.bias], "lr": 0.02, "weight_decay": 0.0},
        ]
        optimizer = make(groups, lr=0.05, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        encoder, decoder, optimizer, scheduler = acc.prepare(encoder, decoder, optimizer, scheduler)
        norms = []
        for index in range(4):
            x = torch.randn(8, 4)
            if form == "loop":
                acc.backward(loss_fn(encoder, decoder, x))
            else:
                acc.backward(loss_fn, encoder, decoder, x)
            norms.append(acc.clip_grad_norm_([*encoder.parameters(), *decoder.parameters()], 0.5))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=index % 2 == 0)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(copy.deepcopy(state))
        acc.backward(loss_fn(encoder, decoder, x))
        optimizer.step()
        return norms, dict(encoder.state_dict()), dict(decoder.state_dict()), state["state"], state["param_groups"]

    assert_same_on_jax(script)
