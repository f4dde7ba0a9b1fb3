"""Modules of the meta device on the jax engine: values are computed part by part, straight into the parts of the devices."""

from __future__ import annotations

import weakref

import jax
import numpy as np
import pytest
import torch
from torch import nn

from polyaccel import Accelerator, init_empty_weights
from polyaccel.errors import PrepareError


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def _losses(model: nn.Module, **settings: object) -> tuple[list[float], object]:
    accelerator = Accelerator(backend="jax", compilation_cache="off", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(20):
        x = torch.from_numpy(rng.normal(size=(16, 8)).astype(np.float32))
        loss = nn.functional.cross_entropy(model(x), torch.arange(16) % 4)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 2}], ids=str)
def test_a_model_without_values_trains_as_one_that_was_made_whole(mesh: dict[str, int]) -> None:
    torch.manual_seed(5)
    whole, _ = _losses(network(), partitioning="sharding")
    empty = Accelerator(backend="jax", compilation_cache="off", mesh=mesh).create_model(network)
    assert all(parameter.is_meta for parameter in empty.parameters())
    torch.manual_seed(5)
    sharded, model = _losses(empty, mesh=mesh, partitioning="sharding")
    np.testing.assert_allclose(sharded, whole, rtol=0, atol=1e-5)  # fp32 sums in another order
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_replica_programs_of_parts_are_those_of_copies() -> None:
    torch.manual_seed(5)
    copies, _ = _losses(network(), mesh={"data": 4})
    torch.manual_seed(5)
    parts, _ = _losses(network(), mesh={"fsdp": 4})
    np.testing.assert_allclose(parts, copies, rtol=0, atol=1e-5)


def test_the_host_has_the_layer_in_hand_and_at_most_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    put = jax.device_put

    alive: list[weakref.ref[np.ndarray]] = []

    def watched(value: object, *args: object, **kwargs: object) -> object:
        if isinstance(value, np.ndarray) and value.size > 4096:
            made.append(value.shape)
            on_host = sum(former() is not None for former in alive)
            assert on_host <= 1, f"{len(alive)} layers were made, and {on_host} of them are still on the host"
            alive.append(weakref.ref(value))
            value = value.copy()  # jax may hold an array for long, or use it in place: what holds the other is ours
        return put(value, *args, **kwargs)

    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)])
    monkeypatch.setattr(jax, "device_put", watched)
    Accelerator(backend="jax", compilation_cache="off", mesh={"fsdp": 4}).prepare(model)
    assert made == [(128, 128)] * 4


def test_what_reset_parameters_would_not_make_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

    class Adjusted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            nn.init.zeros_(self.layer.weight)

    class Partial(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.apply(self._init_weights)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.weight.data.zero_()

    accelerator = Accelerator(backend="jax", compilation_cache="off")
    reasons = {
        Own: r"scale of Own .* has no reset_parameters",
        Adjusted: r"weight of Adjusted .* more than Linear.reset_parameters",
        lambda: Partial(4, 4): r"bias of Partial .* does not write it",
        Applied: "_init_weights",
    }
    for make, reason in reasons.items():
        with init_empty_weights():
            model = make()
        with pytest.raises(PrepareError, match=reason):
            accelerator.prepare(model)
