"""The torch engine in one process: what a step computes, what it refuses, and what is known before a job is joined."""

from __future__ import annotations

import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_network import X, Y, accelerator, hand_written, mean_squared_error, network, weights

from polyaccel.errors import LaunchError, PlanError, PrepareError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel_torch.backend import TorchBackend
from polyaccel_torch.parallel import join


@pytest.mark.parametrize("form", ["value", "function", "train_step"])
def test_every_form_of_a_step_equals_the_hand_written_loop_bit_for_bit(form):
    run = accelerator()
    model = network()
    # fused=False: the hand-written loop's own kernels; the next test is about the others
    model, optimizer = run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=False))
    step = run.train_step(mean_squared_error, model, optimizer, max_grad_norm=0.5)
    losses = []
    for _ in range(4):
        if form == "train_step":
            losses.append(step((X, Y)).item())
            continue
        if form == "value":
            loss = mean_squared_error(model, (X, Y))
            run.backward(loss)
        else:
            loss = run.backward(mean_squared_error, model, (X, Y))
        run.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected_losses, expected_weights = hand_written(torch.optim.AdamW, lr=0.01, fused=False)
    assert losses == expected_losses
    assert all(map(torch.equal, weights(model), expected_weights))


def test_four_micro_batches_equal_one_batch():
    run = accelerator(gradient_accumulation_steps=4)
    model = network()
    model, optimizer, loader = run.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(X, Y), batch_size=4)
    )
    for batch in loader:
        with run.accumulate(model):
            run.backward(mean_squared_error(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            assert all((p.grad is None) == run.sync_gradients for p in model.parameters())
    whole = network()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    mean_squared_error(whole, (X, Y)).backward()
    optimizer.step()
    for ours, theirs in zip(weights(model), weights(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # four partial sums instead of one


def test_a_step_adds_few_python_calls_to_the_hand_written_one():
    """Counted, not timed: every call costs 50 to 100 ns, and a forgotten inspect.signature or find_spec costs hundreds of calls."""

    def calls(step) -> int:
        step(), step()  # caches and lazily made state
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
        return count

    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, fused=False)

    def by_hand() -> None:
        mean_squared_error(model, (X, Y)).backward()
        plain.step()
        plain.zero_grad()

    run = accelerator()
    prepared = network()
    prepared, optimizer = run.prepare(prepared, torch.optim.SGD(prepared.parameters(), lr=0.1, fused=False))

    def by_us() -> None:
        run.backward(mean_squared_error(prepared, (X, Y)))
        optimizer.step()
        optimizer.zero_grad()

    assert calls(by_us) - calls(by_hand) <= 10


# -- what a loss function returns --------------------------------------------------------------------------------------


def test_auxiliary_values_are_detached_tensors():
    def loss_fn(model, batch):
        output = model(batch[0])
        loss = nn.functional.mse_loss(output, batch[1])
        return loss, {"output": output, "correct": (output > 0).sum(), "seen": 16, "rate": 0.5, "note": "kept"}

    run = accelerator()
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    result = run.train_step(loss_fn, model, optimizer)((X, Y))
    assert set(result) == {"loss", "output", "correct", "seen", "rate", "note"}
    assert not result["loss"].requires_grad
    assert not result["output"].requires_grad
    assert result["output"].shape == (16, 2)
    assert (result["seen"].item(), result["rate"].item(), result["note"]) == (16, 0.5, "kept")


@pytest.mark.parametrize("loss", [1.5, np.float32(1.5)], ids=["float", "numpy"])
def test_a_loss_that_is_no_tensor_is_refused_by_its_type(loss):
    with pytest.raises(PrepareError, match=type(loss).__name__):
        accelerator().backward(loss)


def test_a_loss_without_a_graph_is_refused_with_the_usual_causes():
    run = accelerator()
    model = run.prepare(network())
    with torch.no_grad():
        loss = mean_squared_error(model, (X, Y))
    with pytest.raises(PrepareError, match="depends on no parameter") as caught:
        run.backward(loss)
    assert "no_grad" in caught.value.hint


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    run = accelerator()
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(PrepareError, match=r"SGD\.param_groups\[0\]\['params'\]\[0\], of shape \(8, 4\)"):
        run.prepare(network(), optimizer)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_short_last_batch_stays_short_in_one_process():
    run = accelerator()
    loader = run.prepare(DataLoader(TensorDataset(X), batch_size=6))
    assert [len(batch[0]) for batch in loader] == [6, 6, 4]


def test_any_iterable_of_batches_can_be_prepared_as_a_loader():
    batches = [{"x": np.full((2,), i, np.float32)} for i in range(3)]
    loader = accelerator().prepare_data_loader(batches)
    assert len(loader) == 3
    assert [(batch["x"].tolist(), loader.end_of_dataloader) for batch in loader] == [
        ([0.0, 0.0], False),
        ([1.0, 1.0], False),
        ([2.0, 2.0], True),
    ]


def test_a_prepared_loader_stays_as_it_is_and_no_engine_cuts_it_again():
    run = accelerator()
    original = DataLoader(TensorDataset(X), batch_size=6)
    loader = run.prepare(original)
    assert run.prepare(loader) is loader
    assert run.prepare(original) is loader
    with pytest.raises(PrepareError, match="prepared already"):
        run._engine.prepare_loader(loader, run._loader_spec())


def test_the_backend_declares_itself_without_torch():
    probe = TorchBackend().probe()
    assert probe.is_usable
    assert probe.is_loaded
    assert probe.version == torch.__version__.split("+")[0] or probe.version == torch.__version__


def test_one_worker_per_gpu_and_as_many_as_asked_for_on_cpu(monkeypatch):
    backend = TorchBackend()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert len(backend.worker_slots(None, use_cpu=False)) == 2
    assert len(backend.worker_slots(1, use_cpu=False)) == 1
    assert len(backend.worker_slots(None, use_cpu=True)) == 1
    assert len(backend.worker_slots(5, use_cpu=True)) == 5
    with pytest.raises(LaunchError, match=r"--num-processes 3 .* 2"):
        backend.worker_slots(3, use_cpu=False)
    assert len(backend.worker_slots(None, use_cpu=False, gpus=("1",))) == 1
    with pytest.raises(LaunchError, match=r"--num-processes 2 .* 1"):
        backend.worker_slots(2, use_cpu=False, gpus=("1",))


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match=r"3 processes .* torch sees 2"):
        join(Rendezvous(0, 3, 0, 3, "127.0.0.1", 1), use_cpu=False)


@pytest.mark.parametrize("index", [0, 1])
def test_a_job_that_cannot_be_joined_names_the_address(index):
    place = Rendezvous(index, 2, index, 2, "127.0.0.1", 29517)
    with pytest.raises(LaunchError, match=r"process \d of 2 could not join the job at 127\.0\.0\.1:29517 within 1 s"):
        join(place, use_cpu=True, timeout=timedelta(seconds=1))
