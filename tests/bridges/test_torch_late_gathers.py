"""mesh.fsdp on torch modules: each block's parameters are gathered again in the backward pass, in the dtype of the computation."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import on_jax
from torch import nn

torch.set_num_threads(1)
WIDTH, NUM_BLOCKS = 128, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """With a table that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x @ self.table.weight.T


def trained(num_devices, **options):
    """Losses of five steps, and how often arrays of each type are gathered in one, as it goes to the compiler."""
    acc = on_jax(num_devices, split_batches=True, **options)
    torch.manual_seed(0)
    model = Stack()
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    step = acc.train_step(lambda model, ids: F.cross_entropy(model(ids), ids), model, optimizer)
    compiles = acc._engine.compiles
    texts, run = [], compiles.run

    def noted(function, *args):
        texts.append(function.lower(*args).as_text())
        compiles.run = run
        return run(function, *args)

    compiles.run = noted
    ids = torch.randint(0, 96, (16,), generator=torch.Generator().manual_seed(0))
    losses = [float(step(ids)) for _ in range(5)]
    acc.end_training()
    return np.array(losses), Counter(re.findall(r"all_gather\"?\(.*?-> tensor<([^>]*)>", texts[0]))


@pytest.mark.parametrize(("dtype", "remat"), [("f32", "none"), ("bf16", "none"), ("bf16", "full")])
def test_blocks_are_gathered_twice_and_the_numbers_are_those_of_one_device(dtype, remat):
    options = {"remat": remat} if dtype == "f32" else {"mixed_precision": "bf16", "remat": remat}
    losses, gathered = trained(4, mesh={"fsdp": 4}, **options)
    expected, none = trained(1, **options)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5 if dtype == "f32" else 2e-2)
    assert not none
    up, down = gathered[f"{2 * WIDTH}x{WIDTH}x{dtype}"], gathered[f"{WIDTH}x{2 * WIDTH}x{dtype}"]
    # Two of each of the blocks, and again in their backward pass; what the last ones used is still there.
    assert 2 * NUM_BLOCKS + 2 * (NUM_BLOCKS - 2) <= up + down <= 2 * (2 * NUM_BLOCKS) - 1
    other = "bf16" if dtype == "f32" else "f32"
    assert not any(
        kind.startswith((f"{WIDTH}x{2 * WIDTH}x", f"{2 * WIDTH}x{WIDTH}x")) for kind in gathered if kind.endswith(other)
    )
