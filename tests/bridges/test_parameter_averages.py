"""One torch script with averages of its parameters, on torch and on jax: the same numbers, one program, and nothing lost in 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import EMA, Accelerator, LocalSGD
from polyaccel.errors import UnsupportedError

X = torch.arange(96.0).reshape(32, 3).sin()
Y = X.prod(1, keepdim=True)


def network(norm: type[nn.Module] = nn.LayerNorm) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), norm(8), nn.GELU(), nn.Linear(8, 1))


def trained(backend: str, norm: type[nn.Module] = nn.LayerNorm, **options):
    """(accelerator, model, ema) after eight updates."""
    accelerator = Accelerator(backend=backend, cpu=True)
    model = network(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8 // accelerator.num_data_shards)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMA(model, **options)
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    return accelerator, model, ema


def test_torch_and_jax_average_the_same_numbers() -> None:
    states = {backend: trained(backend, decay=0.9)[2].state_dict() for backend in ("torch", "jax")}
    assert states["torch"]["num_updates"] == states["jax"]["num_updates"] == 8
    on_torch, on_jax = (states[backend]["averages"] for backend in ("torch", "jax"))
    assert list(on_torch) == list(on_jax) == [name for name, _ in network().named_parameters()]
    for name, average in on_torch.items():
        np.testing.assert_allclose(on_jax[name], average, rtol=2e-5, atol=2e-6, err_msg=name)


def test_averages_of_one_engine_go_on_on_the_other() -> None:
    state = trained("torch", decay=0.9)[2].state_dict()
    _, model, ema = trained("jax", decay=0.9)
    ema.load_state_dict(state)
    with ema.applied():
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(parameter.detach().numpy(), state["averages"][name], err_msg=name)


def test_changing_decays_compile_one_program() -> None:
    accelerator, _, ema = trained("jax", decay=0.9, warmup=True)
    assert [event.program for event in accelerator.compile_events].count("EMA.update") == 1
    before = len(accelerator.compile_events)
    ema.update()
    assert len(accelerator.compile_events) == before


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_evaluation_inside_sees_the_averages_and_training_goes_on_from_the_parameters(
    backend: str, tmp_path: Path
) -> None:
    accelerator, model, ema = trained(
        backend, nn.BatchNorm1d, decay=0.9
    )  # whose running statistics stay the model's own
    model.eval()
    averages = ema.state_dict()["averages"]
    reference = network(nn.BatchNorm1d)
    state = {name: np.asarray(value.detach()) for name, value in model.state_dict().items()}
    reference.load_state_dict({name: torch.tensor(averages.get(name, value)) for name, value in state.items()})
    reference.eval()
    with torch.no_grad():
        before = model(X)
        with ema.applied():
            inside = model(X)
            accelerator.save_model(model, tmp_path)
        after = model(X)
    written = load_file(tmp_path / "model.safetensors")
    for name, average in averages.items():
        np.testing.assert_array_equal(written[name], average, err_msg=name)
    np.testing.assert_allclose(np.asarray(inside), reference(X).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(np.asarray(inside), np.asarray(before), rtol=1e-3)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_average_of_bfloat16_parameters_moves_by_less_than_their_rounding(backend: str) -> None:
    accelerator = Accelerator(backend=backend, cpu=True)
    module = nn.Linear(2, 2, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    model = accelerator.prepare(module)
    ema = EMA(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(10):
        ema.update()
    average = ema.state_dict()["averages"]["weight"]
    assert average.dtype == np.float32
    np.testing.assert_allclose(average, 2 - 0.999**10, rtol=1e-6)
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.detach().float().flatten()[0].item() == 1.0078125  # the nearest number of bfloat16
    assert model.weight.detach().float().flatten()[0].item() == 2.0


def plain_steps(backend: str, *, enabled: bool) -> np.ndarray:
    accelerator = Accelerator(backend=backend, cpu=True)
    module = nn.Linear(3, 1)
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.arange(4.0) / 4, module.parameters())
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with LocalSGD(accelerator, model, local_sgd_steps=2, enabled=enabled) as local_sgd:
        for _ in range(3):
            accelerator.backward(nn.functional.mse_loss(model(X), Y))
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
    assert local_sgd.num_steps == 3
    return model.weight.detach().numpy().copy()


def test_local_sgd_of_one_data_shard_is_ordinary_training() -> None:
    weight = plain_steps("torch", enabled=True)
    np.testing.assert_array_equal(weight, plain_steps("torch", enabled=False))
    assert not np.array_equal(weight, [[0.0, 0.25, 0.5]])


def test_local_sgd_on_data_shards_that_share_parameters_is_refused_and_can_be_switched_off() -> None:
    if Accelerator(backend="jax", cpu=True).num_data_shards == 1:
        pytest.skip("needs several devices in one process")
    with pytest.raises(UnsupportedError, match=r"share one set[\s\S]*LocalSGD\(..., enabled=False\)"):
        plain_steps("jax", enabled=True)
    np.testing.assert_allclose(plain_steps("jax", enabled=False), plain_steps("torch", enabled=False), rtol=1e-5)
