"""A torch script on jax: one program per bucket, exact means, and a recompile that says which input changed from what to what."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import on_jax
from torch import nn
from torch.utils.data import DataLoader

from polyaccel import Accelerator
from polyaccel.data import Bucketing, counted, masked_mean


class Tagger(nn.Module):
    """Scores of 5 tags for every word: (batch, time) -> (batch, time, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.tags = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tags(self.words(ids))


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [
        {
            "ids": torch.randint(20, (length,), generator=generator),
            "labels": torch.randint(5, (length,), generator=generator),
        }
        for length in lengths
    ]


def word_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["ids"]).mT, batch["labels"], reduction="none")  # (batch, time)


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return masked_mean(word_losses(model, batch), batch["mask"])


def exact_loss(model: nn.Module, batch: dict[str, torch.Tensor], per_sample: torch.Tensor) -> torch.Tensor:
    return masked_mean(word_losses(model, batch), batch["mask"], per_sample)


def prepared(accelerator: Accelerator, num_samples: int, batch_size: int, bucketing: Bucketing):
    torch.manual_seed(0)
    model = Tagger()
    loader = DataLoader(sentences(num_samples), batch_size=batch_size, collate_fn=bucketing)  # type: ignore[arg-type]
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), loader)


def test_ragged_batches_compile_one_program_per_bucket_with_the_last_short_batch():
    accelerator = on_jax()
    model, optimizer, loader = prepared(accelerator, 23, 2, Bucketing([4, 8], batch_size=2))
    step = accelerator.train_step(loss_fn, model, optimizer)
    for _ in range(2):
        for batch in loader:
            step(batch)
    events = accelerator.compile_events
    assert [event.program for event in events] == ["train_step of loss_fn"] * 2
    assert events[0].cause == "first call"
    assert "batch['ids'] changed from int64[2, " in events[1].cause
    assert "mode" not in events[1].cause
    assert events[0].step == 0
    assert events[1].step > 0
    assert min(event.capture_s for event in events) > 0
    assert min(event.compile_s for event in events) > 0


@pytest.mark.parametrize("form", ["value", "function"])  # the loss sees the whole batch, or that of one shard
def test_a_mean_over_ragged_batches_is_exact_over_shards_micro_batches_and_a_window_cut_short(form: str):
    samples = sentences(20)
    torch.manual_seed(0)
    reference = Tagger()
    # Windows of 2 micro batches with 4 samples each (2 per shard): 8, 8 and the last 4 samples.
    for first in (0, 8, 16):
        losses = [word_losses(reference, {k: v[None] for k, v in one.items()}) for one in samples[first : first + 8]]
        torch.cat([loss.flatten() for loss in losses]).mean().backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * parameter.grad
        reference.zero_grad()

    accelerator = on_jax(2, gradient_accumulation_steps=2)
    model, optimizer, loader = prepared(accelerator, 20, 2, Bucketing([8], batch_size=4))
    num_updates = 0
    for batch, per_sample in counted(loader, accelerator):
        with accelerator.accumulate(model):
            if form == "value":
                accelerator.backward(masked_mean(word_losses(model, batch), batch["mask"], per_sample))
            else:
                accelerator.backward(exact_loss, model, batch, torch.tensor(per_sample))
            optimizer.step()
            optimizer.zero_grad()
            num_updates += accelerator.sync_gradients
    assert num_updates == 3
    for name, value in accelerator.unwrap_model(model).named_parameters():
        # float32, three updates summed in another order
        torch.testing.assert_close(value.data, reference.get_parameter(name).data, rtol=2e-5, atol=2e-6)


def test_a_recompile_names_the_input_the_static_value_or_the_mode_that_changed():
    accelerator = on_jax()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = accelerator.prepare(model)

    def scaled(model: nn.Module, x: torch.Tensor, power: str) -> torch.Tensor:
        y = model(x.float())
        return (y * y if power == "square" else y.abs()).mean()

    def causes() -> list[str]:
        return [event.cause for event in accelerator.compile_events if event.program.startswith("backward")]

    x = torch.ones(3, 4)
    accelerator.backward(scaled, model, x, "square")
    accelerator.backward(scaled, model, x.double(), "square")
    accelerator.backward(scaled, model, x, "abs")
    model.eval()
    accelerator.backward(scaled, model, x, "abs")
    assert causes()[0] == "first call"
    assert "x changed from float32[3, 4] to float64[3, 4]" in causes()[1]
    assert "power changed from 'square' to 'abs'" in causes()[2]
    assert "mode of Sequential changed from training to evaluation" in causes()[3]


def test_a_recompile_is_logged_and_the_eighth_program_is_a_warning(caplog: pytest.LogCaptureFixture):
    accelerator = on_jax()
    model = accelerator.prepare(nn.Linear(4, 2))
    with caplog.at_level(logging.INFO, logger="polyaccel.jax"), torch.no_grad():
        for size in range(1, 9):
            model(torch.ones(size, 4)).sum().item()
            model(torch.ones(size, 4)).sum().item()
    records = [record for record in caplog.records if "forward of Linear" in record.getMessage()]
    assert [record.levelno for record in records] == [logging.INFO] * 7 + [logging.WARNING]
    assert records[0].getMessage().startswith("compiled forward of Linear in ")
    assert "program 2: input changed from float32[1, 4] to float32[2, 4]" in records[1].getMessage()
    assert "polyaccel.data.Bucketing" in records[-1].getMessage()
