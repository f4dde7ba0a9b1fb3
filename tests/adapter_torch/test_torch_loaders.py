"""Torch DataLoaders cut over data shards: same order as a hand-written loop, nothing of the user's loader lost."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from polyaccel.data import UNKNOWN_ROWS, DataSharding, GlobalRows, LoaderState, prepared_loader
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.metrics import BatchRows
from polyaccel.protocols import LoaderSpec
from polyaccel_torch.dialect.loaders import TorchHostLoader
from polyaccel_torch.placement import StreamFeeder

NUMBERS = list(range(22))


class Stream(IterableDataset):
    """0 .. size, its part of it in a worker."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        info = get_worker_info()
        index, count = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(index, self.size, count))


def cut(loader, num_shards=1, shard=0, local=1, *, synchronize=None, rng_types=("generator",), **options):
    sharding = DataSharding(num_shards, shard, local, **options)
    exchange = None if synchronize is None else lambda value: [synchronize(value)]
    spec = LoaderSpec(rng_types=rng_types, dispatch_batches=False)
    return prepared_loader(TorchHostLoader(loader).shard(sharding, spec=spec, exchange=exchange), prefetch=1)


def lists(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


class Mailbox:
    """Two processes one after the other: what process 0 said is what process 1 hears."""

    def __init__(self) -> None:
        self.said: collections.deque = collections.deque()

    def main(self, value):
        self.said.append(value)
        return value

    def other(self, value):
        del value
        return self.said.popleft()


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_process_shuffles_exactly_as_a_hand_written_loop(own_generator, num_workers):
    def loader() -> DataLoader:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4) if own_generator else None
        return DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=generator, num_workers=num_workers)

    by_hand = loader()
    expected = [lists(by_hand), lists(by_hand)]
    drawn = torch.rand(3)
    prepared = cut(loader())
    assert [lists(prepared), lists(prepared)] == expected
    # Training draws from the global generator too: it must be left where the hand-written loop leaves it.
    assert torch.equal(torch.rand(3), drawn)


def test_all_batches_of_all_shards_are_the_sampler_of_process_0():
    mail = Mailbox()
    torch.manual_seed(0)
    expected = torch.cat(list(DataLoader(NUMBERS, batch_size=4, shuffle=True))).tolist()
    torch.manual_seed(0)
    first = lists(cut(DataLoader(NUMBERS, batch_size=4, shuffle=True), 2, 0, synchronize=mail.main))
    torch.manual_seed(99)  # process 1 was seeded differently and follows all the same
    second = lists(cut(DataLoader(NUMBERS, batch_size=4, shuffle=True), 2, 1, synchronize=mail.other))
    read = [number for pair in zip(first, second, strict=True) for batch in pair for number in batch]
    assert read[:22] == expected, "the order is that of one process with process 0's seed"
    assert read[22:] == expected[:2]


@pytest.mark.parametrize(
    "sampler",
    [
        lambda g: RandomSampler(NUMBERS, generator=g),
        lambda g: WeightedRandomSampler([1.0] * 22, 22, generator=g),
        lambda g: WeightedRandomSampler([1.0] * 22, 22),
    ],
    ids=["random with a generator", "weighted with a generator", "weighted without"],
)
def test_processes_with_different_generators_agree_on_process_0(sampler):
    mail = Mailbox()
    orders = []
    for process, exchange in enumerate((mail.main, mail.other)):
        torch.manual_seed(process)
        loader = DataLoader(NUMBERS, batch_size=11, sampler=sampler(torch.Generator().manual_seed(process)))
        prepared = cut(loader, 2, 0, 2, synchronize=exchange)  # both shards, to see the whole order
        orders.append([lists(prepared), lists(prepared)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1], "each pass has its own order"
    assert not mail.said, "both processes exchanged equally often"


@pytest.mark.parametrize(
    ("kind", "draw"),
    [
        ("torch", lambda: torch.rand(()).item()),
        ("numpy", lambda: float(np.random.rand())),
        ("python", random.random),
    ],
)
def test_global_generators_are_taken_from_process_0_when_asked(kind, draw):
    mail = Mailbox()
    drawn = []
    for process, exchange in enumerate((mail.main, mail.other)):
        torch.manual_seed(process)
        np.random.seed(process)
        random.seed(process)
        lists(cut(DataLoader(NUMBERS, batch_size=11), 2, process, synchronize=exchange, rng_types=(kind,)))
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_an_unknown_generator_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="'jax'"):
        cut(DataLoader(NUMBERS), rng_types=("jax",))


def test_the_users_loader_is_not_changed():
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=True)
    before = dict(vars(loader)), dict(vars(loader.sampler)), dict(vars(loader.batch_sampler))
    lists(cut(loader, 2, 1))
    assert (dict(vars(loader)), dict(vars(loader.sampler)), dict(vars(loader.batch_sampler))) == before


def test_options_and_subclass_are_kept():
    class Mine(DataLoader):
        """Adds what a user would add."""

        label = "mine"

    def collate(samples):
        return torch.tensor(samples) * 10

    loader = Mine(NUMBERS, batch_size=4, collate_fn=collate, num_workers=2, prefetch_factor=3, persistent_workers=True)
    prepared = cut(loader, 2, 1)
    assert lists(prepared) == lists(prepared) == [[40, 50, 60, 70], [120, 130, 140, 150], [200, 210, 0, 10]]
    assert (prepared.label, prepared.num_workers, prepared.prefetch_factor, prepared.batch_size) == ("mine", 2, 3, 4)
    assert prepared.total_batch_size == 8
    assert prepared.collate_fn is collate


def test_the_remainder_is_known_on_the_last_batch_only():
    for num_workers in (0, 2):
        loader = cut(DataLoader(NUMBERS, batch_size=4, num_workers=num_workers), 2, 0)
        assert [(loader.end_of_dataloader, loader.remainder) for _ in loader] == [(False, -1), (False, -1), (True, 6)]
        dropping = cut(DataLoader(NUMBERS, batch_size=4, drop_last=True, num_workers=num_workers), 2, 0)
        assert [dropping.remainder for _ in dropping] == [-1, -1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterable_dataset_is_cut_and_its_completed_batches_are_known(num_workers):
    read = [cut(DataLoader(Stream(22), batch_size=4, num_workers=num_workers), 2, shard) for shard in range(2)]
    real: list[int] = []
    for first, second in zip(*read, strict=True):
        assert len(first) == len(second) == 4
        remainder = read[0].remainder
        real += torch.cat([first, second]).tolist()[: remainder if remainder >= 0 else None]
    assert sorted(real) == NUMBERS, "every sample is a real one exactly once"
    with pytest.raises(TypeError, match="Stream"):
        len(read[0])


def test_an_iterable_dataset_of_whole_batches_is_dealt_out():
    class Ready(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(12).view(3, 4))

    assert lists(cut(DataLoader(Ready(), batch_size=None), 2, 0)) == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert lists(cut(DataLoader(Ready(), batch_size=None), 2, 1)) == [[4, 5, 6, 7], [0, 1, 2, 3]]
    joined = cut(DataLoader(Ready(), batch_size=None), 2, 0, 2)
    assert lists(joined)[0] == [0, 1, 2, 3, 4, 5, 6, 7]
    split = cut(DataLoader(Ready(), batch_size=None), 2, 1, split_batches=True)
    assert lists(split) == [[2, 3], [6, 7], [10, 11]]


def test_whole_batches_that_cannot_be_split_are_refused_with_both_numbers():
    class Ready(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(10).view(2, 5))

    with pytest.raises(PrepareError, match="5 samples over 2 data shards"):
        lists(cut(DataLoader(Ready(), batch_size=None), 2, 0, split_batches=True))


def test_a_batch_sampler_given_as_sampler_is_cut():
    dataset = TensorDataset(torch.arange(10))
    sampler = BatchSampler(SequentialSampler(dataset), 3, False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    assert [batch[0].tolist() for batch in cut(loader, 2, 1)] == [[3, 4, 5], [9, 0, 1]]


def test_a_sampler_of_batch_keys_is_dealt_out_and_cannot_serve_two_shards_at_once():
    keyed = {"a": torch.tensor([1]), "b": torch.tensor([2]), "c": torch.tensor([3])}
    loader = DataLoader(keyed, sampler=["a", "b", "c"], batch_size=None)
    assert lists(cut(loader, 2, 1)) == [[2], [1]]
    with pytest.raises(UnsupportedError, match="2 data shards"):
        cut(loader, 2, 0, 2)


def test_a_distributed_sampler_is_refused_because_samples_would_be_lost():
    loader = DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS, num_replicas=2, rank=0))
    with pytest.raises(PrepareError, match="2 replicas"):
        cut(loader, 2, 0)


def test_a_prepared_loader_is_refused_the_second_time():
    prepared = cut(DataLoader(NUMBERS))
    with pytest.raises(PrepareError, match="prepared already"):
        TorchHostLoader(prepared)


def test_split_batches_of_an_indivisible_size_are_refused_with_both_numbers():
    with pytest.raises(PrepareError, match="batch_size=3 over 2 data shards"):
        cut(DataLoader(NUMBERS, batch_size=3), 2, 0, split_batches=True)


def test_set_epoch_reaches_sampler_and_dataset():
    class Recorder(list):
        epoch = None

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    dataset, sampler = Recorder(NUMBERS), Recorder(NUMBERS)
    loader = cut(DataLoader(dataset, batch_size=4, sampler=sampler))
    lists(loader)
    assert (dataset.epoch, sampler.epoch) == (0, 0)
    loader.set_epoch(5)
    assert (dataset.epoch, sampler.epoch) == (5, 5)


def test_a_shuffled_pass_continues_in_its_own_order():
    torch.manual_seed(1)
    loader = cut(DataLoader(NUMBERS, batch_size=4, shuffle=True))
    whole = []
    for number, batch in enumerate(loader):
        whole.append(batch.tolist())
        if number == 1:
            state = loader.state
    assert isinstance(state, LoaderState)
    assert state.batch == 2
    torch.manual_seed(2)
    resumed = cut(DataLoader(NUMBERS, batch_size=4, shuffle=True))
    resumed.load_state(state)
    assert lists(resumed) == whole[2:]


def test_a_feeder_moves_every_leaf_that_can_be_moved():
    feeder = StreamFeeder(torch.device("meta"), lambda host, placed: (host["text"], placed))
    host = {"x": torch.ones(2), "nested": [(torch.zeros(1), 3)], "text": "kept"}
    text, placed = feeder.hand_out(host, feeder.place(host))
    assert text == placed["text"] == "kept"
    assert placed["x"].is_meta
    assert placed["nested"][0][0].is_meta
    assert placed["nested"][0][1] == 3


def test_two_loops_over_one_loader_do_not_disturb_each_other():
    loader = cut(DataLoader(NUMBERS, batch_size=4), 2, 0)
    outer = []
    for batch in loader:
        outer.append(batch.tolist())
        assert len(lists(loader)) == 3
    assert outer == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]


def test_workers_that_may_overtake_each_other_hide_which_batch_repeats_samples_and_metrics_say_so():
    unordered = cut(DataLoader(NUMBERS, batch_size=4, num_workers=2, in_order=False), 2, 0)
    rows = [unordered.rows for _ in unordered]
    assert UNKNOWN_ROWS in rows
    assert set(rows) <= {None, UNKNOWN_ROWS}
    with pytest.raises(UnsupportedError, match="in_order=False"):
        BatchRows(0, 2, UNKNOWN_ROWS).require_known()
    alone = cut(DataLoader(NUMBERS, batch_size=4, num_workers=2, in_order=False), 1, 0)
    assert sorted(4 if alone.rows is None else alone.rows.num_real for _ in alone) == [2, 4, 4, 4, 4, 4]


def test_the_short_last_batch_of_a_stream_is_known_in_one_process_too():
    loader = cut(DataLoader(Stream(6), batch_size=4), 1, 0)
    assert [loader.rows for _ in loader] == [None, GlobalRows((2,), 2, 4)]
