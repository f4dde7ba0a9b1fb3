"""A run that goes on over another mesh, with as large a global batch, takes the samples that are left in the same order."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from polyaccel import Accelerator
from polyaccel.registry import load_backend
from polyaccel.utils import set_seed

pytestmark = pytest.mark.skipif(not load_backend("jax").probe().is_usable, reason="needs jax")
CUT, NUM_PASSES = 3, 2  # the third of six batches; with windows of two, the first of the second window
CLOSE = 1e-6


def train(folder, mesh, batch_size, accumulate, *, load=False, leaves=False):
    """(samples, loss) of every global batch, from the start or from the checkpoint; `leaves`: a break before the save."""
    accelerator = Accelerator(
        backend="jax", cpu=True, mesh=mesh, gradient_accumulation_steps=accumulate, project_dir=folder
    )
    set_seed(5 if load else 3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.utils.data.TensorDataset(torch.arange(48), x, x.roll(1, 1))
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if load:
        accelerator.load_state()
    seen = []

    def passes():
        for _ in range(loader.epoch, NUM_PASSES):
            yield from loader

    def step(batch):
        numbers, inputs, targets = batch
        with accelerator.accumulate(model):
            loss = mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((numbers.tolist(), loss.item()))

    for batch in passes():
        step(batch)
        if len(seen) == CUT and not load:
            if leaves:
                break
            accelerator.save_state()
    if leaves:
        accelerator.save_state()
        for batch in passes():
            step(batch)
    accelerator.end_training()
    return seen


@pytest.mark.parametrize(("accumulate", "leaves"), [(2, False), (1, True)])
def test_a_run_goes_on_over_other_meshes_with_the_samples_that_are_left(tmp_path, accumulate, leaves):
    """A pass that is left with `break` begins again, after the checkpoint as in the run that went on."""
    whole = train(tmp_path, {"fsdp": 4}, 2, accumulate, leaves=leaves)
    assert len(whole) == CUT * leaves + 6 * NUM_PASSES
    for mesh, batch_size in (({"fsdp": 2, "tensor": 2}, 4), ({"data": 2, "fsdp": 2}, 2)):
        rest = train(tmp_path, mesh, batch_size, accumulate, load=True)
        for (numbers, loss), (expected, expected_loss) in zip(rest, whole[CUT:], strict=True):
            assert numbers == expected
            assert loss == pytest.approx(expected_loss, rel=CLOSE)
