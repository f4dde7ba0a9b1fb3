"""Values that a loop reads before its backward: from the second step on the gradients are computed in the same run, and stay right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from loop_scripts import Net, batches, sgd, trained
from torch import nn

torch.set_num_threads(1)


def runs_of(acc) -> list[str]:
    """What the engine is asked to run from now on: the values of a recording, its step, gradients apart, or kept ones to add."""
    seen: list[str] = []
    names = {"GradientsRecipe": "ahead", "AddingRecipe": "add", "TapeRecipe": ""}
    engine = acc._engine
    forward, backward = engine.run_forward, engine.backward

    def run_forward(call):
        seen.append(names[type(call.signature).__name__] or "values")
        return forward(call)

    def run_backward(call, **options):
        seen.append(names[type(call.signature).__name__] or "step")
        return backward(call, **options)

    engine.run_forward, engine.backward = run_forward, run_backward
    return seen


def test_from_the_second_step_on_forward_and_backward_run_once():
    acc = on_jax()
    model, optimizer = acc.prepare(net := Net(), sgd(net))
    seen, steps, counts = runs_of(acc), [], []
    for x, y in batches(4):
        loss = F.cross_entropy(model(x), y)
        loss.item()
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(list(seen))
        seen.clear()
        counts.append(acc._engine.num_compiles)
    assert steps == [["values", "ahead", "add"], *[["ahead", "add"]] * 3]
    assert counts[0] == counts[-1]  # the second step runs what the first one compiled


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):  # (batch, 6) -> (batch, 3)
        return self.head(torch.relu(self.norm(self.body(x))))


@pytest.mark.parametrize(("make", "num_devices"), [(Net, 1), (Net, 4), (Normed, 1)])
def test_training_with_early_reads_gives_torchs_numbers(make, num_devices):
    read = []

    def loss_of(step, model, x, y):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        read.append(loss.item())
        read.append((logits.argmax(-1) == y).float().mean().item())
        return loss

    def script(acc):
        read.clear()
        return trained(acc, loss_of, model=make()), list(read)

    assert_same_on_jax(script, num_devices=num_devices)


def test_operations_between_the_read_and_backward_are_foreseen_too():
    acc = on_jax()
    model = acc.prepare(Net())
    seen = runs_of(acc)
    for x, y in batches(3):
        seen.clear()
        loss = F.cross_entropy(model(x), y)
        loss.item()
        loss = loss / 2
        acc.backward(loss)
        assert loss.item() > 0
    assert seen == ["ahead", "add"]

    def loss_of(step, model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.item()
        loss = loss / 2
        assert loss.item() > 0
        return loss + 0.1 * sum(p.pow(2).sum() for p in model.parameters())

    assert_same_on_jax(lambda acc: trained(acc, loss_of))


def test_gradient_accumulation_and_edited_gradients_stay_right():
    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        seen = []
        for index, (x, y) in enumerate(batches(8)):
            loss = F.cross_entropy(model(x), y)
            seen.append(loss.item())
            if index == 5:
                optimizer.zero_grad()  # between the read and its backward
            acc.backward(loss / 2)
            if index % 2:
                with torch.no_grad():
                    model.head.bias.grad.mul_(0.5)
                seen.append(model.body.weight.grad.norm().item())
                optimizer.step()
                optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_the_scale_of_accumulate_reaches_kept_gradients():
    def weights(early):
        torch.manual_seed(0)
        acc = on_jax(gradient_accumulation_steps=2)
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        for x, y in batches(6):
            with acc.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                if early:
                    loss.item()
                acc.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-6, atol=1e-7)


def test_two_losses_of_one_forward_and_several_forwards():
    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        seen = []
        for x, y in batches(4):
            first, second = model(x), model(x * 0.5)
            one, two = F.cross_entropy(first, y), (first - second).pow(2).mean()
            seen += [one.item(), two.item()]
            if hasattr(acc, "_engine"):
                acc.backward(one, retain_graph=True)
            else:
                one.backward(retain_graph=True)
            acc.backward(two)
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_a_branch_on_the_value_that_was_read_takes_the_right_gradients():
    def loss_of(step, model, x, y):
        loss = F.cross_entropy(model(x), y)
        if loss.item() > 0 and step % 3 == 2:  # another loss than the one that was foreseen
            loss = loss * 3 + model.head.weight.pow(2).sum()
        return loss

    assert_same_on_jax(lambda acc: trained(acc, loss_of, steps=8))


def test_evaluation_without_no_grad_costs_one_backward_and_then_none():
    acc = on_jax()
    model, optimizer = acc.prepare(net := Net(), sgd(net))
    seen, steps = runs_of(acc), []
    for kind in "tttevaluatetttt":
        seen.clear()
        x, y = batches(1)[0]
        loss = F.cross_entropy(model(x), y)
        loss.item()
        if kind == "t":
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        del loss
        steps.append("+".join(seen))
    assert steps[:3] == ["values+ahead+add", "ahead+add", "ahead+add"]
    evaluated = [step for kind, step in zip("tttevaluatetttt", steps, strict=True) if kind != "t"]
    assert evaluated.count("ahead") == 1
    assert steps[-1] == "ahead+add"  # and training comes back to one run


def test_numbers_stay_right_when_evaluation_and_training_alternate():
    def script(acc):
        model, optimizer = acc.prepare(net := Normed(), sgd(net))
        seen = []
        for index, (x, y) in enumerate(batches(10)):
            loss = F.cross_entropy(model(x), y)
            seen.append(loss.item())
            if index in (3, 4, 7):
                continue  # no backward: the batch statistics moved all the same
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_an_early_break_leaves_nothing_behind():
    def script(acc):
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        seen = []
        for _ in range(3):
            for x, y in batches(3):
                loss = F.cross_entropy(model(x), y)
                seen.append(loss.item())
                if len(seen) % 4 == 0:
                    break
                acc.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return seen, dict(model.state_dict())

    assert_same_on_jax(script)


def test_dropout_of_the_value_and_of_its_gradient_are_the_same():
    acc = on_jax()
    model = acc.prepare(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False)))
    weight = model[1].weight.detach().clone()
    seen = set()
    for _ in range(4):
        out = model(torch.ones(1, 64)).sum()
        early = out.item()
        acc.backward(out)
        # The output is linear in the weight: with another mask the product would be another number.
        assert (model[1].weight.grad * weight).sum().item() == pytest.approx(early, abs=1e-5)
        assert out.item() == early
        model.zero_grad()
        seen.add(early)
    assert len(seen) == 4  # and every step draws anew


def test_a_parameter_that_changes_between_the_read_and_backward_is_refused():
    acc = on_jax()
    model, optimizer = acc.prepare(net := Net(), sgd(net))
    for index, (x, y) in enumerate(batches(3)):
        loss = F.cross_entropy(model(x), y)
        loss.item()
        if index == 2:
            with torch.no_grad():
                model.head.weight.mul_(0.5)
            with pytest.raises(RuntimeError, match="was changed"):
                acc.backward(loss)
            break
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def test_values_kept_over_steps_and_a_second_backward():
    acc = on_jax()
    model, optimizer = acc.prepare(net := Net(), sgd(net))
    kept = []
    for x, y in batches(4):
        out = model(x)
        loss = F.cross_entropy(out, y)
        kept.append((loss.item(), out.sum().item(), loss, out))
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    for early, total, loss, out in kept:
        assert (loss.item(), out.sum().item()) == (early, total)
        with pytest.raises(RuntimeError, match="a second time"):
            acc.backward(loss)
    assert all(tensor._ref is None for _, _, *tensors in kept for tensor in tensors)


def test_half_precision_with_loss_scaling_reads_early_too():
    def weights(early):
        torch.manual_seed(0)
        acc = on_jax(mixed_precision="fp16")
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        for x, y in batches(3):
            loss = F.cross_entropy(model(x), y)
            if early:
                loss.item()
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-5, atol=1e-6)
