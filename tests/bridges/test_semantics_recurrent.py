"""Recurrent layers: torch's numbers, a program that does not grow with the sequence, and what is refused.

They hold the lowerings of `polyaccel.recurrence.default` and `polyaccel.recurrence_backward.default`, which no sample of PyTorch reaches.
"""

from __future__ import annotations

import pytest
import torch
from bridge_scripts import on_jax
from semantics import assert_trains_as_torch, sgd
from torch import nn

from polyaccel_bridges.capture import capture_training
from polyaccel_bridges.graphs import TensorSpec

torch.set_num_threads(1)


class Tagger(nn.Module):
    """A recurrent layer and what most models do with its outputs and last states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.rnn.dropout = 0.0
        width = (2 if self.rnn.bidirectional else 1) * (self.rnn.proj_size or 4)
        self.head = nn.Linear(width, 2)

    def forward(self, x, state=None):
        out, last = self.rnn(x, state)
        hidden, cell = last if isinstance(last, tuple) else (last, last)
        return self.head(out) + hidden.mean() + cell.square().mean()


def sequences(num: int = 2) -> list[torch.Tensor]:
    return [torch.randn(4, 5, 3) for _ in range(num)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "bias": False}),
        (nn.LSTM, {"proj_size": 2}),  # not a scan: PyTorch's own steps
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {"bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    ],
    ids=str,
)
def test_recurrent_layers_train(kind, options):
    assert_trains_as_torch(lambda: Tagger(kind, **options), sequences, forms=("loop", "function")[: 1 + (not options)])


def test_a_state_that_is_given_gets_its_gradient_and_cells_work():
    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Parameter(torch.randn(1, 1, 4))
            self.gru = nn.GRU(3, 4)
            self.cell = nn.LSTMCell(4, 4)

        def forward(self, x):  # (batch, time, 3)
            out, last = self.gru(x.transpose(0, 1), self.start.expand(-1, len(x), -1).contiguous())
            state = (last[0], torch.zeros_like(last[0]))
            for row in out[:2]:
                state = self.cell(row, state)
            return state[0] * state[1] + self.gru(x[0])[0].mean()  # a sequence without a batch

    assert_trains_as_torch(Stepwise, sequences, forms=("function",))


def test_a_frozen_recurrent_layer_passes_gradients_on():
    def frozen():
        model = nn.Sequential(nn.Linear(3, 3), Tagger(nn.LSTM))
        model[1].requires_grad_(False)
        return model

    assert_trains_as_torch(frozen, sequences, forms=("loop",))


def test_a_recurrent_layer_can_be_differentiated_twice():
    def penalty(model, x):
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return slope.square().sum() + model(x).square().mean()

    def short():
        return [x[:, :2] for x in sequences()]

    assert_trains_as_torch(lambda: Tagger(nn.LSTM), short, penalty, forms=("function",))


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_reaches_the_products_of_a_recurrent_layer(kind):
    def loss(model, x):
        # torch's oneDNN kernels have no narrow LSTM on some machines
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):
            out = model(x)
        return out.float().pow(2).mean()

    # bfloat16 keeps 8 bits, and sums of it are rounded at other places.
    assert_trains_as_torch(lambda: Tagger(kind), sequences, loss, forms=("function",), atol=2e-2, rtol=0.1)


def test_the_program_does_not_grow_with_the_sequence():
    def size(time: int) -> int:
        model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5)

        def step(x):
            return model(x)[0].square().mean(), []

        graph = capture_training(step, {"model": model}, [TensorSpec((time, 2, 3), torch.float32)], autocast=None)
        return len(graph.program.instructions)

    assert size(3) == size(50)


def test_dropout_between_layers_is_drawn_anew_at_every_step():
    acc = on_jax()
    model = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    model, _ = acc.prepare(model, sgd(model))
    x = torch.randn(5, 2, 3)
    first, second = model(x)[0].detach().clone(), model(x)[0].detach().clone()
    assert not torch.equal(first, second)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x)[0].clone(), model(x)[0].clone())
