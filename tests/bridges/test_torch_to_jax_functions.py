"""Loss functions of torch scripts on jax: `accelerator.backward(loss_fn, model, batch)` and `accelerator.train_step`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel.errors import PrepareError

torch.set_num_threads(1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def data(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 4), torch.randint(0, 3, (size,))


def trained(acc, make_loss, steps: int = 4):
    """Train with `make_loss(model, x, y, step) -> (function, arguments)`."""
    model = net()
    model, optimizer = acc.prepare(model, sgd(model))
    seen = []
    for index in range(steps):
        x, y = data()
        function, args = make_loss(model, x, y, index)
        seen.append(acc.backward(function, *args))
        optimizer.step()
        optimizer.zero_grad()
    return seen, dict(model.state_dict())


def num_compiles(acc) -> int:
    return acc._engine.num_compiles


def test_a_loss_function_of_model_and_batch():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    assert_same_on_jax(lambda acc: trained(acc, lambda m, x, y, i: (loss_fn, (m, {"x": x, "y": y}))))


def test_a_closure_over_the_batch_made_anew_at_every_step():
    def make(model, x, y, index):
        return (lambda: F.cross_entropy(model(x), y)), ()

    assert_same_on_jax(lambda acc: trained(acc, make))


def test_closures_over_the_batch_compile_once():
    acc = on_jax()
    model = net()
    model, optimizer = acc.prepare(model, sgd(model))
    counts = []
    for _ in range(3):
        x, y = data()
        acc.backward(lambda: F.cross_entropy(model(x), y))  # noqa: B023 - as a user would write it
        optimizer.step()
        optimizer.zero_grad()
        counts.append(num_compiles(acc))
    assert counts[0] == counts[-1]


def test_auxiliary_values_keep_their_structure():
    def loss_fn(model, x, y):
        out = model(x)
        correct = (out.argmax(-1) == y).sum()
        return F.cross_entropy(out, y), {"correct": correct, "pair": (out.amax(-1), [x.shape[0], "name", None])}

    assert_same_on_jax(lambda acc: trained(acc, lambda m, x, y, i: (loss_fn, (m, x, y))))


def test_numbers_that_change_become_inputs_or_stay_out():
    def loss_fn(model, x, y, weight, step, names):
        return F.cross_entropy(model(x), y) * weight

    def make(model, x, y, index):
        return loss_fn, (model, x, y, 0.5 + 0.1 * index, index, [f"sample {index}"])

    assert_same_on_jax(lambda acc: trained(acc, make))
    acc = on_jax()
    model = acc.prepare(net())
    counts = []
    for index in range(5):
        x, y = data()
        acc.backward(*(lambda f, args: (f, *args))(*make(model, x, y, index)))
        counts.append(num_compiles(acc))
    assert counts[-1] == counts[2]  # the first change is noticed, the next ones cost nothing


def test_a_number_that_decides_a_branch_is_captured_for_each_of_its_values():
    def loss_fn(model, x, y, step):
        loss = F.cross_entropy(model(x), y)
        return loss * 2 if step % 2 else loss

    assert_same_on_jax(lambda acc: trained(acc, lambda m, x, y, i: (loss_fn, (m, x, y, i))))


def test_a_number_of_the_surrounding_code_counts_with_its_present_value():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        seen, scale = [], 1.0

        def loss_fn(model, x, y):
            return F.cross_entropy(model(x), y) * scale

        for _ in range(4):
            seen.append(acc.backward(loss_fn, model, *data()))
            optimizer.step()
            optimizer.zero_grad()
            scale = scale * 0.5
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_tensors_of_the_surrounding_code_count_with_their_present_values():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        criterion, bonus = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none"), torch.zeros(())

        def loss_fn(model, x, y):  # on two shards: the mean over each shard's samples, then over the shards
            return criterion(model(x), y).mean() * (1 + bonus)

        for _ in range(3):
            acc.backward(loss_fn, model, *data())
            optimizer.step()
            optimizer.zero_grad()
            bonus += 0.5
            criterion.weight.mul_(0.9)
        return dict(model.state_dict())

    assert_same_on_jax(script)
    assert_same_on_jax(script, num_devices=2)


def test_gradients_of_inputs_inside_a_loss_function():
    def loss_fn(model, x, y):  # a gradient penalty: double backward
        x = x.clone().requires_grad_()
        out = model(x).logsumexp(-1).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return (slope.norm(dim=-1) - 1).pow(2).mean() + F.cross_entropy(model(x), y)

    assert_same_on_jax(lambda acc: trained(acc, lambda m, x, y, i: (loss_fn, (m, x, y))), atol=1e-5)


def test_several_models_are_found_among_the_arguments_and_in_the_closure():
    def script(acc):
        student, teacher = net(), net()
        student, optimizer, teacher = acc.prepare(student, sgd(student), teacher)

        def loss_fn(model, x):
            with torch.no_grad():
                target = teacher(x).softmax(-1)
            return F.kl_div(model(x).log_softmax(-1), target, reduction="batchmean")

        for _ in range(2):
            acc.backward(loss_fn, student, data()[0])
            optimizer.step()
            optimizer.zero_grad()
        return dict(student.state_dict())

    assert_same_on_jax(script)


def test_what_a_loss_function_may_not_return_is_said():
    acc = on_jax()
    model = acc.prepare(net())
    x, y = data()
    with pytest.raises(PrepareError, match="returned a float"):
        acc.backward(lambda m: 1.0, model)
    with pytest.raises(PrepareError, match="shape"):
        acc.backward(lambda m: m(x), model)
    with pytest.raises(PrepareError, match="no trainable parameter"):
        acc.backward(lambda m: F.cross_entropy(m(x).detach(), y), model)
    with pytest.raises(PrepareError, match="value"):
        acc.backward(lambda m: F.cross_entropy(m(x), y) * (2 if m(x).sum().item() > 0 else 1), model)


def test_the_fused_step_with_clipping_accumulation_and_a_schedule():
    def losses(fused: bool) -> list[float]:
        torch.manual_seed(0)
        acc = on_jax(gradient_accumulation_steps=2)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        x, y = data(32)
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        model, optimizer, loader, schedule = acc.prepare(model, optimizer, loader, schedule)

        def loss_fn(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        step = acc.train_step(loss_fn, model, optimizer, schedule, max_grad_norm=0.1)
        seen = []
        for batch in loader:
            if fused:
                seen.append(step(batch).item())
                continue
            with acc.accumulate(model):
                loss = loss_fn(model, batch)
                acc.backward(loss)
                if acc.sync_gradients:
                    acc.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                seen.append(loss.item())
        return seen

    assert losses(fused=True) == pytest.approx(losses(fused=False), abs=1e-6)  # one float32 rounding per step


def test_parameters_beside_their_model_get_their_gradients():
    def script(acc):
        model = net()
        weight = model[0].weight
        model, optimizer = acc.prepare(model, sgd(model))
        for _ in range(2):
            x, y = data()
            acc.backward(lambda: F.cross_entropy(model(x), y) + weight.pow(2).sum())  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
            acc.backward(lambda m, b: F.cross_entropy(m(x), y) + b.abs().sum(), model, model[2].bias)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_values_that_need_gradients_from_outside_are_refused():
    acc = on_jax()
    model = acc.prepare(net())
    x, y = data()
    out = model(x)
    with pytest.raises(PrepareError, match="requires grad"):
        acc.backward(lambda: F.cross_entropy(out, y))
    with pytest.raises(PrepareError, match="requires grad"):
        acc.backward(lambda m, extra: F.cross_entropy(m(x), y) + extra, model, nn.Parameter(torch.zeros(())))
    head = nn.Linear(3, 3)
    with pytest.raises(PrepareError, match=r"head\.(weight|bias)"):
        acc.backward(lambda m: F.cross_entropy(head(m(x)), y), model)
