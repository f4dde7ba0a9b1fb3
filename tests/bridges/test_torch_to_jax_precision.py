"""Mixed precision, loaders and the rest of the accelerator around torch loops on jax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import PlainTorch, on_jax, run
from captured_parity import train_both
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def train(acc, *, steps: int = 8, form: str = "value", dtype: torch.dtype | None = None):
    model = net()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))

    def loss_fn(model, x, y):
        if dtype is not None:  # what Accelerate does around a prepared model
            with torch.autocast("cpu", dtype=dtype):
                out = model(x)
            out = out.float()
        else:
            out = model(x)
        assert out.dtype == torch.float32
        return F.cross_entropy(out, y)

    seen = []
    for _ in range(steps):
        if form == "value":
            loss = loss_fn(model, x, y)
            acc.backward(loss)
        else:
            loss = acc.backward(loss_fn, model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return seen


@pytest.mark.parametrize("form", ["value", "function"])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_follows_torchs_autocast(name, dtype, form):
    expected = run(lambda acc: train(acc, dtype=dtype, form=form), PlainTorch())
    actual = run(lambda acc: train(acc, form=form), on_jax(mixed_precision=name))
    # 8 bits of mantissa (bf16) or 11 (fp16), rounded at other places by XLA: 1% of a loss near 1.
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_fp16_overflow_skips_the_step_and_is_reported(num_devices):
    acc = on_jax(num_devices=num_devices, mixed_precision="fp16")
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    acc.backward((model(torch.ones(4, 4)) * 1e38).sum() * 1e5)
    optimizer.step()
    assert acc.optimizer_step_was_skipped
    assert model.weight.detach().flatten().tolist() == [0.5] * 4
    optimizer.zero_grad()
    acc.backward(model(torch.ones(4, 4)).mean())
    optimizer.step()
    assert not acc.optimizer_step_was_skipped


def test_autocast_reaches_operations_outside_the_model():
    acc = on_jax(mixed_precision="bf16")
    model = acc.prepare(net())
    out = model(torch.randn(2, 8))
    with acc.autocast():
        assert (out @ torch.randn(4, 3)).dtype == torch.bfloat16
    assert (out @ torch.randn(4, 3)).dtype == torch.float32


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_loader_epoch_with_metrics_is_that_of_plain_torch(num_devices):
    torch.manual_seed(0)
    x, y = torch.randn(22, 8), torch.randint(0, 4, (22,))
    acc = on_jax(num_devices=num_devices)
    model, reference = net(), net()
    reference.load_state_dict(model.state_dict())
    loader = DataLoader(TensorDataset(x, y), batch_size=8 // num_devices)
    model, loader = acc.prepare(model, loader)
    assert acc.device == torch.device("cpu")
    model.eval()
    outputs, labels = [], []
    for inputs, targets in loader:
        assert type(inputs) is torch.Tensor
        with torch.no_grad():
            logits = model(inputs.to(acc.device))
        predicted, real = acc.gather_for_metrics((logits.argmax(-1), targets))
        outputs.append(predicted)
        labels.append(real)
    assert torch.equal(torch.cat(labels), y)
    assert torch.equal(torch.cat(outputs), reference.eval()(x).argmax(-1))


def test_a_batch_that_was_changed_in_place_is_used_as_changed():
    acc = on_jax()
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    model, loader = acc.prepare(model, DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=4))
    for (inputs,) in loader:
        inputs.mul_(3)
        with torch.no_grad():
            assert model(inputs).sum().item() == 12


def test_evaluation_without_no_grad_gives_values_and_stays_small():
    acc = on_jax()
    model = net()
    model = acc.prepare(model)
    model.eval()
    compiles = []
    for _ in range(5):
        out = model(torch.randn(4, 8))
        out.argmax(-1).tolist()
        compiles.append(acc._engine.num_compiles)
    assert compiles[-1] == compiles[0]
    kept = [model(torch.randn(4, 8)) for _ in range(40)]
    assert torch.cat([out.detach() for out in kept]).shape == (160, 4)


def test_one_seed_gives_the_same_dropout_again():
    def losses() -> list[float]:
        torch.manual_seed(0)
        acc = on_jax()
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        seen = []
        for _ in range(3):
            loss = model(torch.randn(4, 8)).pow(2).mean()
            acc.backward(loss)
            optimizer.step()
            seen.append(loss.item())
        return seen

    assert losses() == losses()


def test_attention_in_float64_is_computed_in_float64():
    model = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def step(modules, x):
        out, _ = modules["model"](x, x, x, need_weights=False)
        return out.square().mean()

    assert train_both(step, {"model": model}, [x], floor=1e-3).worst < 1e-12
