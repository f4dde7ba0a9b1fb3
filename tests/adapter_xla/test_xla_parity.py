"""Four virtual devices train as one plain torch process does on the host: same weights, same batches, same numbers."""

import copy

import pytest
import torch
from adapter_xla.cases import CASES, GPT, adamw, language_loss, text, torch_losses, warmup_cosine, xla_losses

from polyaccel import Accelerator, set_seed

# Two compilers add the same float32 numbers in different orders; over 20 to 40 steps this stays far below 1e-4.
RTOL = 1e-4


def largest_difference(left, right):
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_give_torchs_losses_and_torchs_model(name):
    make, data, loss_fn = CASES[name]
    torch.manual_seed(0)
    model = make()
    expected, reference = torch_losses(model, data(), loss_fn, epochs=10)
    losses, trained, accelerator = xla_losses(model, data(), loss_fn, epochs=10)
    assert len(losses) == 30
    assert largest_difference(losses, expected) < RTOL
    # In evaluation, with the running statistics of BatchNorm. Outputs, because Adam turns the rounding of gradients that are
    # exactly zero (the bias of attention keys) into steps of full size.
    inputs = data()[:8][0]
    inputs = inputs[:, :-1] if name == "gpt" else inputs
    with torch.no_grad():
        ours, theirs = trained.eval()(inputs.to(accelerator.device)).cpu(), reference.eval()(inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["function", "train_step"])
@pytest.mark.parametrize("name", ["mlp", "cnn with batch norm"])
def test_the_other_forms_of_a_step_give_the_same_numbers(name, form):
    make, data, loss_fn = CASES[name]
    torch.manual_seed(0)
    model = make()
    expected, _ = torch_losses(model, data(), loss_fn, epochs=7, max_norm=0.5)
    losses, _, _ = xla_losses(model, data(), loss_fn, epochs=7, max_norm=0.5, form=form)
    assert largest_difference(losses, expected) < RTOL


def test_accumulation_clipping_and_a_warm_up_from_zero_together():
    make, data, loss_fn = CASES["gpt"]
    torch.manual_seed(0)
    model = make()
    settings = {"epochs": 8, "batch": 8, "accumulate": 4, "max_norm": 0.5, "scheduler": warmup_cosine}
    expected, _ = torch_losses(model, data(), loss_fn, **settings)
    losses, _, _ = xla_losses(model, data(), loss_fn, form="train_step", **settings)
    assert len(losses) == 48
    assert losses[-1] < losses[0] - 0.3  # it learned, so the comparison is about moving weights
    assert largest_difference(losses, expected) < RTOL


def test_clipping_by_value_is_torchs():
    make, data, loss_fn = CASES["mlp"]
    torch.manual_seed(0)
    model = make()
    accelerator = Accelerator(backend="xla")
    reference = copy.deepcopy(model)
    x, y = data()[:16]
    loss_fn(reference, (x, y)).backward()
    torch.nn.utils.clip_grad_value_(reference.parameters(), 1e-3)
    prepared = accelerator.prepare(model)
    accelerator.backward(loss_fn(prepared, (x.to(accelerator.device), y.to(accelerator.device))))
    accelerator.clip_grad_value_(prepared.parameters(), 1e-3)
    for parameter, other in zip(prepared.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), other.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_bf16_follows_torchs_bf16_within_two_percent(name):
    # bfloat16 keeps 8 bits; the two runtimes round at different places.
    make, data, loss_fn = CASES[name]
    torch.manual_seed(0)
    model = make()
    expected, _ = torch_losses(model, data(), loss_fn, epochs=10, bf16=True)
    losses, trained, _ = xla_losses(model, data(), loss_fn, epochs=10, mixed_precision="bf16")
    assert largest_difference(losses, expected) < 0.02
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_bf16_computes_in_bfloat16_and_returns_float32():
    accelerator = Accelerator(backend="xla", mixed_precision="bf16")
    seen = []

    class Looking(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append(y.dtype)
            return {"out": y}

    model = accelerator.prepare(Looking(4, 4))
    out = model(torch.ones(4, 4, device=accelerator.device))["out"]
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.float32
    with accelerator.autocast():
        assert torch.nn.functional.linear(out, model.weight).dtype == torch.bfloat16


def test_batch_norm_uses_the_statistics_of_the_global_batch():
    accelerator = Accelerator(backend="xla")
    x = torch.arange(8.0).reshape(8, 1)  # two rows per device: statistics of one device would be much narrower
    model = accelerator.prepare(torch.nn.BatchNorm1d(1, momentum=1.0))
    model(x.to(accelerator.device))
    assert model.running_mean.item() == pytest.approx(3.5)
    assert model.running_var.item() == pytest.approx(x.var().item())


def test_dropout_differs_between_steps_and_repeats_with_the_seed():
    torch.manual_seed(0)
    model = GPT(dropout=0.5)

    def run(seed):
        set_seed(seed)
        return xla_losses(model, text(16), language_loss, epochs=6, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))[0]

    first, again, other = run(3), run(3), run(4)
    assert first == again  # bit for bit
    assert first != other
    assert len(set(first)) == 6  # same weights, same batch, another mask at each step


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd with momentum, nesterov and decay": lambda p: torch.optim.SGD(
        p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
    "adamw": adamw,
    "amsgrad": lambda p: torch.optim.AdamW(p, 3e-3, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 3e-3),
    "radam": lambda p: torch.optim.RAdam(p, 3e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 3e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "without foreach": lambda p: torch.optim.AdamW(p, 3e-3, foreach=False),
    "asked to be fused": lambda p: torch.optim.AdamW(p, 3e-3, fused=True),
    "a learning rate tensor": lambda p: torch.optim.SGD(p, torch.tensor(0.05)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_torch_optimizer_keeps_its_numerics(name):
    make, data, loss_fn = CASES["mlp"]
    torch.manual_seed(0)
    model = make()
    expected, _ = torch_losses(model, data(), loss_fn, epochs=7, optimizer=OPTIMIZERS[name], scheduler=warmup_cosine)
    losses, _, _ = xla_losses(model, data(), loss_fn, epochs=7, optimizer=OPTIMIZERS[name], scheduler=warmup_cosine)
    assert largest_difference(losses, expected) < RTOL
