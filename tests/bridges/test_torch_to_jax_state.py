"""Parameters, buffers, gradients and optimizer state of a model that runs on jax, read and written as torch objects."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import PlainTorch, assert_same_on_jax, on_jax
from torch import nn

from polyaccel.errors import PrepareError, UnsupportedError

torch.set_num_threads(1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def data(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 4), torch.randint(0, 2, (size,))


def step(acc, model, optimizer) -> None:
    x, y = data()
    acc.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    optimizer.zero_grad()


def test_references_taken_before_prepare_follow_the_training():
    def script(acc):
        model = net()
        weight, everything = model[0].weight, list(model.parameters())
        own = model
        model, optimizer = acc.prepare(model, sgd(model))
        step(acc, model, optimizer)
        assert weight is own[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight, everything, [p.shape for p in everything], own[1].running_mean

    assert_same_on_jax(script)


def test_the_optimizer_may_be_made_from_the_prepared_model():
    def script(acc):
        model = acc.prepare(net())
        optimizer = acc.prepare(sgd(model))
        for _ in range(2):
            step(acc, model, optimizer)
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_gradients_can_be_read_and_changed_before_the_step():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        assert all(p.grad is None for p in model.parameters())
        x, y = data()
        acc.backward(F.cross_entropy(model(x), y))
        seen = [p.grad.clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad.mul_(0.5)
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        return seen, norm, dict(model.state_dict())

    assert_same_on_jax(script)


def test_gradients_may_be_dropped_one_by_one_or_through_the_model():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        x, y = data()
        acc.backward(F.cross_entropy(model(x), y))
        next(model.parameters()).grad = None
        optimizer.step()
        first = dict(model.state_dict())
        model.zero_grad()
        optimizer.step()
        return first, dict(model.state_dict()), [p.grad for p in model.parameters()]

    assert_same_on_jax(script)


def test_parameters_can_be_written_under_no_grad():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        step(acc, model, optimizer)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
            model[0].weight[0].zero_()
            model[0].weight[1, :2] = 3.0
            model[3].bias.data.fill_(0.25)
            model[3].bias.add_(torch.ones(2))
            model[1].running_mean += 1
        nn.init.constant_(model[0].bias, 0.5)
        model[3].weight.data = torch.full((2, 6), 0.1)
        model.eval()
        with torch.no_grad():
            out = model(torch.ones(2, 4))
        model.train()
        step(acc, model, optimizer)
        return out, dict(model.state_dict())

    assert_same_on_jax(script)


def test_writing_a_leaf_with_gradients_on_fails_as_in_torch():
    model = on_jax().prepare(net())
    with pytest.raises(RuntimeError, match="leaf Variable"):
        model[0].weight.mul_(2)


def test_views_of_parameters_follow_later_values():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        row, flat = model[0].weight.data[0], model[0].weight.detach().view(-1)
        step(acc, model, optimizer)
        return row, flat.sum(), row + 1

    assert_same_on_jax(script)


def test_a_state_dict_round_trip_through_a_file():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        step(acc, model, optimizer)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        best = copy.deepcopy(model.state_dict())
        step(acc, model, optimizer)
        after = {name: value.clone() for name, value in model.state_dict().items()}
        file.seek(0)
        saved = torch.load(file)
        assert all(type(value) is torch.Tensor for value in saved["model"].values())
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        back = {name: value.clone() for name, value in model.state_dict().items()}
        step(acc, model, optimizer)
        return after, back, best, dict(model.state_dict()), optimizer.state_dict()

    assert_same_on_jax(script)


def test_a_state_dict_moves_between_torch_and_jax():
    torch.manual_seed(0)
    acc, reference = on_jax(), net()
    model = copy.deepcopy(reference)
    model, optimizer = acc.prepare(model, sgd(model))
    plain_optimizer = sgd(reference)
    torch.manual_seed(1)
    step(acc, model, optimizer)
    reference.load_state_dict(model.state_dict())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    torch.manual_seed(2)
    step(acc, model, optimizer)
    torch.manual_seed(2)
    step(PlainTorch(), reference, plain_optimizer)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].clone(), value, atol=1e-6, rtol=1e-5)  # float32 sums


def test_missing_keys_are_reported_by_torch():
    model = on_jax().prepare(net())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_copies_are_plain_torch_models():
    acc = on_jax()
    model = net()
    model, optimizer = acc.prepare(model, sgd(model))
    step(acc, model, optimizer)
    for plain in (copy.deepcopy(model), copy.deepcopy(acc.unwrap_model(model))):
        assert type(plain) is nn.Sequential
        assert all(type(p) is nn.Parameter for p in plain.parameters())
        plain(torch.randn(3, 4)).sum().backward()
        torch.testing.assert_close(plain[0].weight.detach(), model[0].weight.detach().clone(), atol=0, rtol=0)


def test_an_average_of_the_weights_may_be_kept():
    def script(acc):
        model = net()
        average = copy.deepcopy(model)
        model, optimizer = acc.prepare(model, sgd(model))
        for _ in range(2):
            step(acc, model, optimizer)
            with torch.no_grad():
                for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(p, 0.1)
        return list(average.parameters())

    assert_same_on_jax(script)


def test_a_learning_rate_schedule_changes_the_steps_without_a_new_compile():
    def script(acc):
        model = net()
        optimizer = sgd(model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, schedule = acc.prepare(model, optimizer, schedule)
        compiles = []
        for _ in range(4):
            step(acc, model, optimizer)
            schedule.step()
            compiles.append(acc._engine.num_compiles if hasattr(acc, "_engine") else 0)
        assert compiles[-1] == compiles[1]
        return dict(model.state_dict()), schedule.get_last_lr(), optimizer.param_groups[0]["lr"]

    assert_same_on_jax(script)


def test_the_optimizer_shows_torchs_state():
    acc = on_jax()
    model = net()
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.state_dict()["state"] == {}
    step(acc, model, optimizer)
    entry = optimizer.state[next(model.parameters())]
    assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
    assert entry["step"].item() == 1
    with pytest.raises(UnsupportedError, match="closure"):
        optimizer.step(lambda: None)
    with pytest.raises(UnsupportedError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_an_optimizer_of_other_parameters_is_refused_by_group_and_index():
    acc = on_jax()
    model, stranger = net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": stranger.parameters()}], lr=0.1)
    with pytest.raises(PrepareError, match="parameter 0 of group 1"):
        acc.prepare(model, optimizer)


def test_a_parameter_put_in_after_prepare_is_refused_by_name():
    acc = on_jax()
    model = acc.prepare(net())
    acc.unwrap_model(model)[3] = nn.Linear(6, 3)
    with pytest.raises(PrepareError, match=r"3\.weight"):
        model(torch.randn(2, 4))


def test_a_prepared_model_keeps_its_dtype_and_device():
    acc = on_jax()
    model = acc.prepare(net())
    assert model.to(acc.device) is model
    assert model.to("cpu") is model
    with pytest.raises(UnsupportedError, match="float16"):
        model.half()
    with pytest.raises(UnsupportedError, match="cuda"):
        model(torch.randn(2, 4)).to("cuda")


def test_the_unwrapped_model_runs_as_plain_torch():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        step(acc, model, optimizer)
        own = acc.unwrap_model(model)
        own.eval()
        with torch.no_grad():
            return own(torch.ones(2, 4)), own[0](torch.ones(1, 4))

    assert_same_on_jax(script)


def test_a_model_prepared_twice_is_refused():
    acc = on_jax()
    model = net()
    acc.prepare(model)
    with pytest.raises(PrepareError, match="prepared before"):
        on_jax().prepare(model)


def test_values_recorded_before_a_change_of_the_parameters_are_those_of_the_old_parameters():
    def script(acc):
        model = net()
        model, optimizer = acc.prepare(model, sgd(model))
        model.eval()
        x, y = data()
        before = model(x)
        early = F.cross_entropy(before, y)
        early.item()
        doubled = early * 2
        acc.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        kept = model(x)
        with torch.no_grad():
            model[0].weight.zero_()
        after = model(x)
        model[3].bias.data = torch.ones(2)
        return before, doubled, kept, after, model(x)

    assert_same_on_jax(script)


def test_a_gradient_that_was_kept_outlives_zero_grad():
    def script(acc):
        model = nn.Linear(3, 1)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        kept = []
        for step in range(3):
            acc.backward(model(torch.randn(4, 3)).pow(2).mean())
            kept.append(model.weight.grad)
            if step == 1:
                model.weight.grad.mul_(2)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step < 2)
        model.weight.grad = None
        return kept  # the last one was set to zeros

    assert_same_on_jax(script)
