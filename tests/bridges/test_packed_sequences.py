"""pack_padded_sequence and pad_packed_sequence around recurrent layers: torch's numbers, one program for all lengths."""

from __future__ import annotations

import pytest
import torch
from bridge_scripts import on_jax
from semantics import assert_trains_as_torch, sgd
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from polyaccel.errors import PrepareError

torch.set_num_threads(1)
LENGTHS = ([5, 2, 3, 4], [1, 5, 5, 2], [3, 4, 5, 1])


class Reader(nn.Module):
    """What sentence encoders do: pack, run, unpack, and use the last states."""

    def __init__(self, kind, is_sorted=False, state=False, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.is_sorted = is_sorted
        self.start = (
            nn.Parameter(torch.randn(self.rnn.num_layers * (1 + self.rnn.bidirectional), 1, 4)) if state else None
        )

    def forward(self, x, lengths):  # (batch, time, 3), (batch,)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=self.is_sorted)
        state = None
        if self.start is not None:  # another one for every sample
            state = self.start * torch.arange(0.2, 1.0, 0.2)[:, None]
            state = (state, state * 0.5) if isinstance(self.rnn, nn.LSTM) else state
        out, last = self.rnn(packed, state)
        out, sizes = pad_packed_sequence(out, batch_first=True)
        hidden, cell = last if isinstance(last, tuple) else (last, last)
        weights = torch.arange(0.1, 0.5, 0.1)
        by_sample = out.sum((1, 2)) / sizes * weights + (hidden * cell * weights[:, None]).sum((0, 2))
        return by_sample + out[:, -1].sum(-1)


def loss(model, batch):
    return model(*batch).pow(2).mean()


def ragged():
    return [(torch.randn(4, 5, 3), torch.tensor(lengths)) for lengths in LENGTHS]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"state": True, "bias": False}),
        (nn.GRU, {"bidirectional": True, "state": True}),
        (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    ],
    ids=str,
)
def test_packed_recurrent_layers_train(kind, options):
    assert_trains_as_torch(lambda: Reader(kind, **options), ragged, loss, forms=("function",))


def test_sorted_batches_and_the_loop_form():
    def batches():
        return [(x, lengths.sort(descending=True).values) for x, lengths in ragged()]

    assert_trains_as_torch(lambda: Reader(nn.GRU, is_sorted=True), batches, loss, forms=("loop",))


def test_one_program_serves_all_lengths():
    acc = on_jax()
    model, _ = acc.prepare(net := Reader(nn.LSTM), sgd(net))
    counts = []
    for batch in ragged():
        acc.backward(loss, model, batch)
        model.zero_grad()
        counts.append(acc._engine.num_compiles)
    assert counts[0] == counts[-1]


def test_padding_of_a_bucket_with_a_total_length():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x, lengths):  # (time, batch, 3)
            x = x.masked_fill(torch.arange(5)[:, None, None] >= lengths[:, None], torch.nan)  # padding may be anything
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], padding_value=0.5, total_length=7)
            return out

    def batches():
        return [(torch.randn(5, 4, 3), torch.tensor(lengths)) for lengths in ([3, 1, 2, 3], [2, 2, 2, 2])]

    assert_trains_as_torch(Fixed, batches, loss, forms=("function",))


def test_pack_sequence_of_pieces_of_known_sizes():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x):
            return self.rnn(pack_sequence([x[0, :2], x[1], x[2, :4]], enforce_sorted=False))[1]

    assert_trains_as_torch(Pieces, lambda: [torch.randn(4, 5, 3) for _ in range(2)], forms=("function",))


@pytest.mark.parametrize(
    ("lengths", "is_sorted"),
    [([4, 2, 3, 1], False), ([6, 2, 3, 5], False), ([5, 0, 3, 4], False), ([5, 2, 3, 4], True)],
)
def test_what_torch_raises_for_or_gives_another_size_for_is_nan(lengths, is_sorted):
    model = on_jax().prepare(Reader(nn.GRU, is_sorted))
    with torch.no_grad():
        assert model(torch.randn(4, 5, 3), torch.tensor(lengths)).isnan().all()


def test_the_data_of_a_packed_sequence_is_refused_with_the_way_out():
    class OnData(nn.Module):
        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return PackedSequence(torch.relu(packed.data), packed.batch_sizes)

    model = on_jax().prepare(OnData())
    with pytest.raises(PrepareError, match="size depends on the lengths"):
        model(torch.randn(4, 5, 3), torch.tensor([5, 2, 3, 4]))
