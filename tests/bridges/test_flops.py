"""What the jax engine counts of a torch model's step is what torch's own counter counts of the same step on torch."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from polyaccel import Accelerator


class Cnn(nn.Module):
    """(batch, 3, 8, 8) -> (batch, 4). Torch counts the gradients of grouped convolutions too high, so there is none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


class Attention(nn.Module):
    """Attention by hand, (batch, time, 8) -> (batch, 8); what sdpa counts depends on the kernel that torch takes."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v).mean(1)


def loss_fn(model, batch):
    return model(batch[0]).square().mean()


@pytest.mark.parametrize(("make", "shape"), [(Cnn, (3, 8, 8)), (Attention, (5, 8))])
@pytest.mark.parametrize("form", ["train_step", "function", "value"])
def test_a_step_on_jax_counts_what_torch_counts(make, shape, form):
    accelerator = Accelerator(backend="jax", split_batches=True)
    model = make()
    data = torch.randn(16, *shape)
    with FlopCounterMode(display=False) as counter:
        loss_fn(model, [data[:8]]).backward()
    model.zero_grad()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(data), batch_size=8)
    )
    step = accelerator.train_step(loss_fn, model, optimizer)
    done = accelerator._engine.count_flops()
    for batch in loader:
        if form == "train_step":
            step(batch)
            continue
        if form == "function":
            accelerator.backward(loss_fn, model, batch)
        else:
            accelerator.backward(loss_fn(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert done() == 2 * counter.get_total_flops()
    assert len([event for event in accelerator.compile_events if "backward" in event.program]) <= 1, (
        "counting compiles nothing"
    )
