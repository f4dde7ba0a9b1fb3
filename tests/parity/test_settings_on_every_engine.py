"""Handlers of Accelerate's constructor in one torch script, on the engine of this environment that is not torch's own."""

import importlib.util

import pytest
import torch
from torch import nn

from polyaccel import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs
from polyaccel.errors import UnsupportedError
from polyaccel.utils import TorchDynamoPlugin

BACKEND = "xla" if importlib.util.find_spec("torch_xla") else "jax"
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))


def train(backend, factors, **arguments):
    """Losses, and which updates were skipped; the loss of each step is multiplied by a factor."""
    run = Accelerator(backend=backend, cpu=True, **arguments)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = X.to(run.device), Y.to(run.device)
    losses, skipped = [], []
    for factor in factors:
        loss = nn.functional.mse_loss(model(x), y)
        run.backward(loss * factor)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        skipped.append(run.optimizer_step_was_skipped)
    return losses, skipped


@pytest.mark.skipif(BACKEND == "xla", reason="this engine has no fp16")
def test_a_scale_that_starts_high_skips_the_same_updates_as_on_torch():
    # 2**30 and 2**20 times these gradients is far more than float16 holds, and 2**10 times is far less.
    handler = GradScalerKwargs(init_scale=2.0**30, backoff_factor=2.0**-10, growth_factor=4.0, growth_interval=2)
    settings = {"mixed_precision": "fp16", "kwargs_handlers": [handler]}
    expected = train("torch", [1.0] * 6, **settings)
    losses, skipped = train(BACKEND, [1.0] * 6, **settings)
    assert skipped == expected[1] == [True, True, False, False, False, False]
    assert losses == pytest.approx(expected[0], abs=2e-3)  # float16 keeps three digits


@pytest.mark.skipif(BACKEND == "xla", reason="this engine has no fp16")
def test_without_a_scaler_no_update_is_skipped():
    settings = {"mixed_precision": "fp16", "kwargs_handlers": [GradScalerKwargs(enabled=False)]}
    assert train(BACKEND, [1.0, 1.0], **settings)[1] == [False, False]


def test_models_compute_in_float32_where_autocast_is_off():
    whole = train(BACKEND, [1.0] * 3)[0]
    narrow = train(BACKEND, [1.0] * 3, mixed_precision="bf16")[0]
    off = train(BACKEND, [1.0] * 3, mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(enabled=False)])[0]
    assert off == whole
    assert narrow != whole


def test_a_block_switches_autocast_off_and_on():
    run = Accelerator(backend=BACKEND, cpu=True, mixed_precision="bf16")
    run.prepare(nn.Linear(4, 4))
    x = X.to(run.device)
    with run.autocast():
        assert torch.mm(x, x.t()).dtype == torch.bfloat16
        with run.autocast(AutocastKwargs(enabled=False)):
            assert torch.mm(x, x.t()).dtype == torch.float32


def test_ddp_settings_are_said_to_have_no_effect_or_refused(caplog):
    Accelerator(backend=BACKEND, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert (
        f"ddp_find_unused_parameters=True (argument DistributedDataParallelKwargs) has no effect on backend {BACKEND!r}"
        in (caplog.text)
    )
    with pytest.raises(UnsupportedError, match="ddp_comm_hook='fp16'"):
        Accelerator(backend=BACKEND, cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook="fp16")])


def test_torch_compile_is_refused_by_the_name_of_its_argument():
    for arguments in ({"dynamo_backend": "inductor"}, {"dynamo_plugin": TorchDynamoPlugin(backend="inductor")}):
        with pytest.raises(UnsupportedError, match=rf"compile=True \(argument {next(iter(arguments))}\)"):
            Accelerator(backend=BACKEND, cpu=True, **arguments)
