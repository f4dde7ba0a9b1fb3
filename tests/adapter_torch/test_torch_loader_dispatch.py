"""Process 0 reads for all: the same samples in the same places, and whatever a batch may hold."""

from __future__ import annotations

import collections
import random
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from polyaccel.data import DataSharding, prepared_loader
from polyaccel.errors import ConfigError, PrepareError, UnsupportedError
from polyaccel.protocols import LoaderSpec
from polyaccel_torch.dialect.loaders import DispatchedLoader, ShardedLoader, TorchHostLoader
from polyaccel_torch.dialect.loaders.parcels import pack, unpack

NUMBERS = list(range(22))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Encoding(collections.UserDict):
    """A mapping of a class of its own, as tokenizers give."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(NUMBERS)


def dispatched(make_loader, num_processes=2, **options):
    """What each process reads, one process after the other: what process 0 said is what the others hear."""
    said: list = []
    read = []
    for process in range(num_processes):
        heard = iter(said)

        def exchange(value, process=process, heard=heard):
            if process == 0:
                said.append(value)
            return [value if process == 0 else next(heard)]

        host = TorchHostLoader(make_loader(process)).shard(
            DataSharding(num_processes, process, 1, **options),
            spec=LoaderSpec(dispatch_batches=True, **options),
            exchange=exchange,
            process_index=process,
        )
        loader = prepared_loader(host, prefetch=1)
        assert isinstance(loader, DispatchedLoader)
        read.append([(batch, loader.rows, loader.end_of_dataloader) for batch in loader])
        assert loader.epoch == 1
    return read


def by_itself(make_loader, num_processes=2, **options):
    read = []
    for process in range(num_processes):
        sharding = DataSharding(num_processes, process, 1, **options)
        spec = LoaderSpec(dispatch_batches=False)
        loader = prepared_loader(TorchHostLoader(make_loader(process)).shard(sharding, spec=spec), prefetch=1)
        read.append([(batch, loader.rows, loader.end_of_dataloader) for batch in loader])
    return read


def plain(read):
    return [[(batch.tolist(), rows, is_last) for batch, rows, is_last in one] for one in read]


@pytest.mark.parametrize("options", [{}, {"split_batches": True}, {"even_batches": False}], ids=str)
@pytest.mark.parametrize(
    "make_loader",
    [
        lambda process: DataLoader(NUMBERS, batch_size=4),
        lambda process: DataLoader(NUMBERS, batch_size=4, drop_last=True),
        lambda process: DataLoader(NUMBERS, batch_size=4, num_workers=1),
        lambda process: DataLoader(Stream(), batch_size=4),
        lambda process: DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    ],
    ids=["in order", "whole batches", "workers", "a stream", "shuffled"],
)
def test_every_process_gets_what_it_would_have_read_itself(make_loader, options):
    assert plain(dispatched(make_loader, **options)) == plain(by_itself(make_loader, **options))


def test_a_stream_that_is_random_gives_every_sample_of_process_0_once():
    class Shuffled(IterableDataset):
        def __init__(self, seed):
            self.random = random.Random(seed)

        def __iter__(self):
            return iter(self.random.sample(NUMBERS, 22))

    first, second = dispatched(lambda process: DataLoader(Shuffled(process), batch_size=2))
    read = [sample for pair in zip(first, second, strict=True) for batch, _, _ in pair for sample in batch.tolist()]
    assert sorted(read[:22]) == NUMBERS


def test_a_batch_is_collated_for_one_process_so_lengths_may_differ():
    def pad(samples):
        longest = max(samples)
        ids = torch.stack([torch.nn.functional.pad(torch.ones(n), (0, longest - n)) for n in samples])
        return Encoding(
            ids=ids.to(torch.bfloat16), names=[f"sample {n}" for n in samples], pair=Pair(ids, ids > 0), last=longest
        )

    first, second = dispatched(lambda process: DataLoader([1, 2, 5, 3], batch_size=2, collate_fn=pad))
    batch, other = first[0][0], second[0][0]
    assert batch["ids"].shape == (2, 2)
    assert other["ids"].shape == (2, 5)
    assert other["ids"].dtype == torch.bfloat16
    assert type(other) is Encoding
    assert type(other["pair"]) is Pair
    assert other["pair"].second.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert (other["names"], other["last"]) == (["sample 5", "sample 3"], 5)


def test_whole_batches_of_a_dataset_are_dealt_out_or_cut():
    class Ready(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(12).view(3, 4))

    dealt = dispatched(lambda process: DataLoader(Ready(), batch_size=None))
    assert [batch.tolist() for batch, _, _ in dealt[1]] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    cut = dispatched(lambda process: DataLoader(Ready(), batch_size=None), split_batches=True)
    assert [batch.tolist() for batch, _, _ in cut[1]] == [[2, 3], [6, 7], [10, 11]]


def test_shapes_that_one_process_cannot_join_are_refused_with_the_cure():
    class Ready(IterableDataset):
        def __iter__(self):
            return iter([torch.ones(2, 3), torch.ones(2, 4)])

    host = TorchHostLoader(DataLoader(Ready(), batch_size=None)).shard(
        DataSharding(2, 0, 2), spec=LoaderSpec(), exchange=lambda value: [value]
    )
    with pytest.raises(RuntimeError, match=r"\(3,\), \(4,\)[\s\S]*collate_fn"):
        list(prepared_loader(host))


def test_a_process_that_feeds_several_shards_gets_one_batch_for_them():
    def pad(samples):
        return torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in samples], batch_first=True)

    host = TorchHostLoader(DataLoader([1, 2, 5, 3], batch_size=2, collate_fn=pad)).shard(
        DataSharding(2, 0, 2), spec=LoaderSpec(dispatch_batches=True), exchange=lambda value: [value]
    )
    assert [tuple(batch.shape) for batch in prepared_loader(host)] == [(4, 5)]


def test_an_error_of_the_reading_is_raised_on_every_process():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    said: list = []

    def read(process, exchange):
        host = TorchHostLoader(DataLoader(Broken(NUMBERS), batch_size=4)).shard(
            DataSharding(2, process), spec=LoaderSpec(dispatch_batches=True), exchange=exchange, process_index=process
        )
        return list(prepared_loader(host))

    with pytest.raises(OSError, match="disk is gone"):
        read(0, lambda value: said.append(value) or [value])
    with pytest.raises(
        PrepareError, match="process 0, which reads the data for all processes, failed: OSError: the disk is gone"
    ):
        read(1, lambda value: [said.pop(0)])


def test_only_containers_that_the_script_knows_are_made_of_what_arrives():
    assert unpack(pack({"pair": Pair(torch.ones(1), torch.zeros(1))}))["pair"]._fields == ("first", "second")
    for module, name in (("os", "system"), ("nowhere", "Batch"), ("builtins", "eval")):
        with pytest.raises(UnsupportedError, match=f"{module}.{name}"):
            unpack({"$object": (module, name, [])})


def test_iterable_datasets_are_dispatched_unless_something_else_is_said():
    def kind(loader, **options):
        return type(prepared_loader(TorchHostLoader(loader).shard(DataSharding(), spec=LoaderSpec(**options))))

    assert kind(DataLoader(Stream(), batch_size=4)) is DispatchedLoader
    assert kind(DataLoader(Stream(), batch_size=4), dispatch_batches=False) is ShardedLoader
    assert kind(DataLoader(Stream(), batch_size=4), device_placement=False) is ShardedLoader
    assert kind(DataLoader(NUMBERS, batch_size=4)) is ShardedLoader
    assert kind(DataLoader(NUMBERS, batch_size=4), dispatch_batches=True) is DispatchedLoader
    assert kind(iter(NUMBERS)) is ShardedLoader
    with pytest.raises(ConfigError, match="device_placement=False"):
        kind(DataLoader(NUMBERS), dispatch_batches=True, device_placement=False)


def test_a_thread_cannot_read_what_process_0_sends():
    host = TorchHostLoader(DataLoader(NUMBERS)).shard(
        DataSharding(2, 0), spec=LoaderSpec(dispatch_batches=True), exchange=lambda value: [value]
    )
    with pytest.raises(UnsupportedError, match="read_in_background"):
        prepared_loader(host, in_background=True)
