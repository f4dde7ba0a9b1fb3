"""How often the xla engine compiles and runs: once per step, whatever a schedule, a metric or a last batch does.

Counts come from torch_xla's own metrics report.
"""

import itertools

import pytest
import torch
from adapter_xla.cases import MLP, adamw, classification_loss, compiles, executions, vectors, warmup_cosine
from torch.utils.data import DataLoader

from polyaccel import Accelerator

widths = itertools.count(17)  # a graph that an earlier test compiled would count as none


def prepared(optimizer=adamw, *, rows=64, batch=16, schedule=None, **arguments):
    accelerator = Accelerator(backend="xla", split_batches=True, **arguments)
    model = MLP(next(widths))
    optimizer = optimizer(model.parameters())
    parts = [model, optimizer, DataLoader(vectors(rows), batch_size=batch)]
    return accelerator, *accelerator.prepare(*parts, *([schedule(optimizer)] if schedule else []))


def counts_of(steps):
    """(compiles, executions) of each item of an iterable of work."""
    counted, before = [], (compiles(), executions())
    for _ in steps:
        now = (compiles(), executions())
        counted.append((now[0] - before[0], now[1] - before[1]))
        before = now
    return counted


def test_a_step_with_clipping_and_a_schedule_is_one_graph_compiled_once():
    accelerator, model, optimizer, loader, scheduler = prepared(schedule=warmup_cosine)

    def steps():
        for _ in range(12):
            for batch in loader:
                loss = classification_loss(model, batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                loss.item()
                yield

    # 48 steps of a rate that starts at 0, moves at every step, and ends at exactly 0: one compilation, at the first.
    assert counts_of(steps()) == [(1, 1)] + [(0, 1)] * 47


def test_the_fused_step_is_one_graph_compiled_once():
    accelerator, model, optimizer, loader, scheduler = prepared(schedule=warmup_cosine)
    step = accelerator.train_step(classification_loss, model, optimizer, scheduler, max_grad_norm=1.0)

    def steps():
        for _ in range(12):
            for batch in loader:
                step(batch).item()
                yield

    assert counts_of(steps()) == [(1, 1)] + [(0, 1)] * 47


OPTIMIZERS = {
    # Momentum starts as a copy of the first gradient: a first step of its own is SGD's formula.
    "sgd": (lambda p: torch.optim.SGD(p, 0.1), [1, 0]),
    "sgd with momentum": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), [1, 1]),
    "adam": (lambda p: torch.optim.Adam(p, 0.1), [1, 0]),
    "adamw without foreach": (lambda p: torch.optim.AdamW(p, 0.1, foreach=False), [1, 0]),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, 0.1), [1, 0]),
    "adagrad": (lambda p: torch.optim.Adagrad(p, 0.1), [1, 0]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_of_zero_one_and_of_other_numbers_in_the_update_compile_nothing(name):
    make, first = OPTIMIZERS[name]
    accelerator, model, optimizer, _ = prepared(make)
    x, y = (tensor.to(accelerator.device) for tensor in vectors(16)[:])

    def steps():
        # 0 and 1 are constants to torch_xla; 0.9, 0.999 and 0.01 stand in the formulas beside the rate.
        for rate in (0.0, 0.1, 0.9, 0.0, 1.0, 0.999, 0.01, 1e-8, 0.5, 1.0):
            optimizer.param_groups[0]["lr"] = rate
            accelerator.backward(classification_loss(model, (x, y)))
            optimizer.step()
            optimizer.zero_grad()
            yield

    assert [count for count, _ in counts_of(steps())] == first + [0] * 8


def test_accumulation_runs_one_graph_per_micro_batch():
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=4)
    step = accelerator.train_step(classification_loss, model, optimizer)

    def steps():
        for _ in range(3):
            for batch in loader:
                step(batch)
                yield

    # The first micro batch makes the gradients, the middle ones add to them, the last one updates.
    assert counts_of(steps()) == [(1, 1), (1, 1), (0, 1), (1, 1)] + [(0, 1)] * 8


def test_a_running_mean_of_the_loss_stays_outside_the_steps_graph():
    accelerator, model, optimizer, loader = prepared()
    total = torch.zeros((), device=accelerator.device)

    def steps():
        nonlocal total
        for _ in range(4):
            for batch in loader:
                loss = classification_loss(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                total = total + loss.detach()
                yield

    counted = counts_of(steps())
    # The zero and the step; the addition, when the second batch is handed out.
    assert [count for count, _ in counted] == [2, 1] + [0] * 14
    assert total.item() > 0


def test_evaluation_runs_the_model_once_per_batch_however_many_metrics_are_read():
    accelerator, model, _, loader = prepared()
    model.eval()
    runs = []

    def steps():
        for _ in range(2):
            for x, y in loader:
                with torch.no_grad():
                    logits = model(x)
                before = executions()
                correct, y = accelerator.gather_for_metrics((logits.argmax(-1) == y, y))
                assert 0 <= correct.float().mean().item() <= 1
                assert y.sum().item() >= 0
                runs.append(executions() - before)
                yield

    counted = counts_of(steps())
    assert [count for count, _ in counted[2:]] == [0] * 6
    assert max(runs) <= 2  # the two numbers that were read; the model has run before


def test_a_smaller_last_batch_is_one_more_graph_and_not_one_per_epoch():
    accelerator, model, optimizer, loader = prepared(rows=38, even_batches=False)  # 16, 16, 6
    step = accelerator.train_step(classification_loss, model, optimizer)

    def steps():
        for _ in range(3):
            for batch in loader:
                step(batch)
                yield

    assert [count for count, _ in counts_of(steps())] == [1, 0, 1] + [0] * 6


def test_a_completed_last_batch_needs_no_graph_of_its_own():
    accelerator, model, optimizer, loader = prepared(rows=38)
    step = accelerator.train_step(classification_loss, model, optimizer)
    counted = counts_of(step(batch) for _ in range(2) for batch in loader)
    assert [count for count, _ in counted] == [1, 0, 0, 0, 0, 0]


def test_a_restored_optimizer_continues_in_the_same_graph():
    accelerator, model, optimizer, loader = prepared()
    step = accelerator.train_step(classification_loss, model, optimizer)
    for batch in loader:
        step(batch)
    optimizer.load_state_dict(optimizer.state_dict())
    counted = counts_of(step(batch) for batch in loader)
    assert [count for count, _ in counted] == [0, 0, 0, 0]


def test_clipping_does_not_wait_for_the_devices():
    accelerator, model, _, loader = prepared()
    accelerator.backward(classification_loss(model, next(iter(loader))))
    before = executions()
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    accelerator.clip_grad_value_(model.parameters(), 0.1)
    assert executions() == before
    assert norm.item() > 0
