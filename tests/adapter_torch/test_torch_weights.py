"""Token weights on the torch engine: the formula, whatever the weights are, half precision, and what a window is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch_network import X, Y, accelerator, mean_squared_error, network, weights

from polyaccel.errors import UnsupportedError

COUNTS = st.lists(st.one_of(st.just(0), st.integers(1, 100_000), st.floats(0.125, 100)), min_size=1, max_size=6)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def rows(index):
    return X[2 * index : 2 * index + 2], Y[2 * index : 2 * index + 2]


def weighted_mean(counts):
    """By the definition: sum(weight * gradient) / sum(weight), in float64; zeros where nothing counts."""
    model = network().double()
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for index, count in enumerate(counts):
        x, y = rows(index)
        grads = torch.autograd.grad(mean_squared_error(model, (x.double(), y.double())), list(model.parameters()))
        total = [one + count * grad for one, grad in zip(total, grads, strict=True)]
    return [one / (sum(counts) or 1) for one in total]


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.booleans(), st.booleans())
def test_a_window_is_the_weighted_mean_of_its_gradients(counts, on_device, accumulates):
    run = accelerator(gradient_accumulation_steps=len(counts) if accumulates else 1)
    model = run.prepare(network())
    for index, count in enumerate(counts):
        weight = torch.tensor(count) if on_device else count
        if accumulates:
            with run.accumulate(model):
                run.backward(mean_squared_error(model, rows(index)), weight=weight)
        else:  # by hand: as many backwards as the script likes before an update
            run.backward(mean_squared_error(model, rows(index)), weight=weight)
    for got, wanted in zip(gradients(model), weighted_mean(counts), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=2e-5, atol=1e-6)  # float32 sums


def test_a_window_ends_with_the_update_or_where_gradients_are_dropped():
    run = accelerator()
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for end in (optimizer.step, lambda: None):
        run.backward(mean_squared_error(model, rows(0)), weight=1000)
        end()
        optimizer.zero_grad()
        run.backward(mean_squared_error(model, rows(1)), weight=3)
        for got, wanted in zip(gradients(model), weighted_mean([0, 3]), strict=True):
            torch.testing.assert_close(got, wanted.float(), rtol=2e-5, atol=1e-6)
        optimizer.zero_grad()


def test_two_models_that_take_turns_have_windows_of_their_own():
    run = accelerator()
    one, other = network(1), network(2)
    one, first, other, second = run.prepare(
        one, torch.optim.SGD(one.parameters(), lr=1.0), other, torch.optim.SGD(other.parameters(), lr=1.0)
    )
    for model, optimizer, weight in ((one, first, 7), (other, second, 100)):
        before = weights(model)
        run.backward(mean_squared_error(model, rows(0)), weight=weight)
        wanted = torch.autograd.grad(mean_squared_error(model, rows(0)), list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        for now, was, gradient in zip(weights(model), before, wanted, strict=True):
            torch.testing.assert_close(now, was - gradient)


def test_a_retained_graph_is_weighted_twice():
    run = accelerator()
    model = run.prepare(network())
    loss = mean_squared_error(model, rows(0))
    run.backward(loss, weight=2, retain_graph=True)
    once = gradients(model)
    run.backward(loss, weight=6)
    for got, wanted in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(got, wanted)


def test_large_counts_do_not_leave_float16():
    run = accelerator(mixed_precision="fp16", gradient_accumulation_steps=2)
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    run._engine._scaler.scaler._init_scale = 1024.0
    for _ in range(2):
        before = weights(model)
        for index, count in enumerate((40_000, 90_000)):
            with run.accumulate(model):
                run.backward(mean_squared_error(model, rows(index)), weight=count)
                optimizer.step()
                if not run.sync_gradients:
                    continue
                assert not run.optimizer_step_was_skipped
                optimizer.zero_grad()
        reference = network()
        reference.load_state_dict(dict(zip(reference.state_dict(), before, strict=True)))
        x, y = X[:4], Y[:4]
        (
            (4 * mean_squared_error(reference, (x[:2], y[:2])) + 9 * mean_squared_error(reference, (x[2:], y[2:]))) / 13
        ).backward()
        for now, was, parameter in zip(weights(model), before, reference.parameters(), strict=True):
            torch.testing.assert_close(now, was - 0.1 * parameter.grad, rtol=0, atol=2e-4)  # float16 has 11 bits


def test_a_name_beside_a_loss_value_is_refused():
    run = accelerator()
    model = run.prepare(network())
    with pytest.raises(UnsupportedError, match="a name is that of an auxiliary value of a loss function"):
        run.backward(mean_squared_error(model, rows(0)), weight="num_tokens")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["value", "name", "train_step"])
def test_nothing_waits_for_a_weight_on_the_device(form):
    def loss_fn(model, batch):
        return mean_squared_error(model, batch), {"rows": torch.tensor(float(len(batch[0])))}

    run = accelerator(gradient_accumulation_steps=2)
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = run.train_step(loss_fn, model, optimizer, max_grad_norm=1.0, weight="rows")
    with Waits() as waits:
        for index in range(4):
            if form == "train_step":
                step(rows(index))
                continue
            with run.accumulate(model):
                if form == "value":
                    run.backward(mean_squared_error(model, rows(index)), weight=torch.tensor(index))
                else:
                    run.backward(loss_fn, model, rows(index), weight="rows")
                run.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert waits.count == 0
        assert torch.ones(()).item() == 1.0
        assert waits.count == 1  # it would have been noticed
