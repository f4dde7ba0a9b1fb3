"""torch.compile on jax: the module inside is captured, whatever part of the model was wrapped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import PlainTorch, on_jax, run
from loop_scripts import Net, batches, sgd
from torch import nn

torch.set_num_threads(1)


def never(graph, inputs):
    raise AssertionError("dynamo compiled something")


class Half(nn.Module):
    """A compiled submodule, a compiled method and a compiled function."""

    def __init__(self, compiled) -> None:
        super().__init__()
        self.net = compiled(Net())
        self.scale = nn.Parameter(torch.ones(3))
        self.activation = compiled(torch.tanh)
        self.mix = compiled(self.mixed)

    def mixed(self, x):
        return x * self.scale

    def forward(self, x):
        return self.mix(self.activation(self.net(x)))


def train(acc, model, loss_fn):
    model, optimizer = acc.prepare(model, sgd(model))
    losses = []
    for index, (x, y) in enumerate(batches(4)):
        loss = loss_fn(model(x), y) if index % 2 else acc.backward(lambda m, x, y: loss_fn(m(x), y), model, x, y)
        if index % 2:
            acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()], sorted(model.state_dict())


def compiled(what):
    return torch.compile(what, backend=never)


def as_written(what):
    return what


@pytest.mark.parametrize("make", [lambda wrap: wrap(Net()), Half], ids=["the whole model", "its parts"])
def test_what_torch_compile_made_is_captured_as_it_was_written(make):
    expected = run(lambda acc: train(acc, make(as_written), F.cross_entropy)[:2], PlainTorch())
    actual = run(lambda acc: train(acc, make(compiled), F.cross_entropy)[:2], on_jax())
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)


def test_names_are_those_that_torch_gives_a_compiled_module():
    plain = torch.compile(Net(), backend=never)
    prepared = on_jax().prepare(torch.compile(Net(), backend=never))
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in prepared.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_module_compile_in_place_is_captured_too():
    model = Net()
    model.compile(backend=never)
    model = on_jax().prepare(model)
    with torch.no_grad():
        assert model(torch.ones(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("whole_step", [False, True])
def test_compiled_functions_of_a_loop_run_as_they_were_written(whole_step):
    def script(acc):
        wrap = as_written if isinstance(acc, PlainTorch) else compiled
        model, optimizer = acc.prepare(net := Net(), sgd(net))
        loss_fn = wrap(lambda out, y: F.cross_entropy(out, y) * 2)
        forward = wrap(lambda x, y: F.cross_entropy(model(x), y) * 2)
        losses = []
        for x, y in batches(3):
            loss = forward(x, y) if whole_step else loss_fn(model(x), y)
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses, [p.detach() for p in model.parameters()]

    torch.testing.assert_close(run(script, on_jax()), run(script, PlainTorch()), atol=2e-6, rtol=2e-5)


def test_a_compiled_loss_in_a_loss_function():
    loss_fn = torch.compile(F.cross_entropy, backend=never)
    acc = on_jax()
    model = acc.prepare(Net())
    x, y = batches(1)[0]
    assert acc.backward(lambda m: loss_fn(m(x), y), model).item() > 0
