"""Weights and tail windows on xla are data of the graphs: no value compiles anew, and a micro batch stays one graph."""

import itertools

import pytest
import torch
from adapter_xla.cases import MLP, adamw, classification_loss, compiles, executions, vectors
from torch.utils.data import DataLoader

from polyaccel import Accelerator

widths = itertools.count(117)  # a graph that an earlier test compiled would count as none
WINDOW = 2


def counted_loss(model, batch):
    return classification_loss(model, batch), {"rows": (batch[0][:, 0] > 0).sum()}


@pytest.mark.parametrize("form", ["number", "name", "train_step"])
def test_windows_of_other_weights_run_the_graphs_of_the_first_ones(form):
    accelerator = Accelerator(backend="xla", split_batches=True, gradient_accumulation_steps=WINDOW)
    model = MLP(next(widths))
    model, optimizer, loader = accelerator.prepare(
        model, adamw(model.parameters()), DataLoader(vectors(128), batch_size=16)
    )
    step = accelerator.train_step(counted_loss, model, optimizer, max_grad_norm=1.0, weight="rows")
    counts = []
    for number, batch in enumerate(loader, 1):
        before = compiles(), executions()
        if form == "train_step":
            step(batch)
        else:
            with accelerator.accumulate(model):
                if form == "number":
                    accelerator.backward(classification_loss(model, batch), weight=number * 1.5)
                else:
                    accelerator.backward(counted_loss, model, batch, weight="rows")
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        counts.append((compiles() - before[0], executions() - before[1]))
    assert [executed for _, executed in counts] == [1] * 8
    # The first two windows: AdamW's state is made in the first, and the second finds gradients where the first found none.
    assert [compiled for compiled, _ in counts[2 * WINDOW :]] == [0] * 4


def test_tail_windows_of_any_size_share_a_graph():
    accelerator = Accelerator(backend="xla", split_batches=True, gradient_accumulation_steps=5, tail_window="actual")
    model = MLP(next(widths))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    compiled = []
    for rows in (16 * 3, 16 * 4, 16 * 3):  # windows of three and four micro batches
        loader = accelerator.prepare(DataLoader(vectors(rows), batch_size=16))
        before = compiles()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(classification_loss(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        compiled.append(compiles() - before)
    assert compiled == [3, 0, 0]  # a first, a further and a closing micro batch
