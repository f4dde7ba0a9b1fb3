"""`polyaccel.data_loader`: the names of `accelerate.data_loader`, over what `prepare` itself uses."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch_network import accelerator

from polyaccel import PartialState
from polyaccel.data_loader import (
    BatchSamplerShard,
    DataLoaderAdapter,
    DataLoaderDispatcher,
    DataLoaderShard,
    DataLoaderStateMixin,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    SkipDataLoader,
    get_sampler,
    prepare_data_loader,
    skip_first_batches,
)
from polyaccel.errors import UnsupportedError


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))

    def __len__(self):
        return 10


@pytest.fixture(autouse=True)
def run():
    """The Accelerator of the test's script."""
    return accelerator()


def lists(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_a_batch_sampler_shard_is_a_batch_sampler_of_one_process():
    batches = BatchSampler(range(7), 2, False)
    shard = BatchSamplerShard(batches, 2, 1)
    assert isinstance(shard, BatchSampler)
    assert (list(shard), len(shard), shard.total_length) == ([[2, 3], [6, 0]], 2, 4)
    shard.even_batches = False
    assert (list(shard), len(shard)) == ([[2, 3], [6]], 2)
    assert list(BatchSamplerShard(batches, 2, 0, split_batches=True)) == [[0], [2], [4], [6]]
    with pytest.raises(ValueError, match="round multiple of 2"):
        BatchSamplerShard(BatchSampler(range(7), 3, False), 2, 0, split_batches=True)


def test_an_iterable_dataset_shard_gives_the_samples_of_one_process():
    shard = IterableDatasetShard(Stream(), batch_size=2, num_processes=2, process_index=1)
    assert (list(shard), len(shard)) == ([2, 3, 6, 7, 0, 1], 6)
    assert list(IterableDatasetShard(Stream(), batch_size=4, drop_last=True, num_processes=2, split_batches=True)) == [
        0,
        1,
        4,
        5,
    ]


def test_skipping_goes_for_samplers_and_for_loaders_prepared_or_not():
    skipping = SkipBatchSampler(BatchSampler(range(8), 2, True), 3)
    assert (list(skipping), len(skipping), skipping.batch_size, skipping.drop_last) == ([[6, 7]], 1, 2, True)
    own = DataLoader(range(8), batch_size=2, pin_memory=False, drop_last=True)
    rest = skip_first_batches(own, 3)
    assert (lists(rest), len(rest), rest.drop_last, lists(own)[0]) == ([[6, 7]], 1, True, [0, 1])
    assert lists(skip_first_batches(prepare_data_loader(own), 3)) == [[6, 7]]
    assert lists(skip_first_batches(DataLoader(Stream(), batch_size=4), 2)) == [[8, 9]]
    assert lists(SkipDataLoader(range(8), batch_size=2, skip_batches=3)) == [[6, 7]]


def test_the_loader_classes_are_names_of_what_prepare_gives(run):
    shard, dispatcher = run.prepare(DataLoader(range(8)), DataLoader(Stream()))
    assert [isinstance(shard, kind) for kind in (DataLoaderShard, DataLoaderDispatcher)] == [True, False]
    assert [isinstance(dispatcher, kind) for kind in (DataLoaderShard, DataLoaderDispatcher)] == [False, True]
    for loader in (shard, dispatcher, DataLoaderShard(range(8)), DataLoaderDispatcher(range(8))):
        assert isinstance(loader, DataLoaderStateMixin)
        assert isinstance(loader, DataLoaderAdapter)
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.base_dataloader, DataLoader)
    assert not isinstance(DataLoader(range(8)), DataLoaderStateMixin)


def test_a_class_below_a_name_is_no_name_for_every_loader():
    class Own(DataLoaderShard):
        pass

    assert issubclass(Own, DataLoaderShard)
    assert isinstance(Own(range(8)), DataLoaderShard)
    assert not isinstance(DataLoaderShard(range(8)), Own)


def test_samplers_cross_processes_and_are_found_under_each_of_their_names():
    shard = BatchSamplerShard(BatchSampler(range(7), 2, False), 2, 1)
    assert list(pickle.loads(pickle.dumps(shard))) == list(shard)
    assert pickle.loads(pickle.dumps(SkipDataLoader)) is SkipDataLoader
    written_earlier = b"cpolyaccel.compat.data_loader\nBatchSamplerShard\n."
    assert pickle.loads(written_earlier) is BatchSamplerShard


def test_a_loader_made_by_its_class_reports_to_the_accelerator_and_starts_where_it_is_told(run):
    loader = DataLoaderShard(range(8), batch_size=2, skip_batches=1, iteration=4)
    for batch in loader:
        assert run.gradient_state.active_dataloader is loader
        assert run.gradient_state.end_of_dataloader == (batch.tolist() == [6, 7])
    assert loader.iteration == 5
    cut = DataLoaderShard(range(7), batch_sampler=BatchSamplerShard(BatchSampler(range(7), 2, False), 2, 1))
    assert [(batch.tolist(), cut.remainder) for batch in cut] == [([2, 3], -1), ([6, 0], 3)]
    assert cut.total_batch_size == 4


def test_a_loader_is_prepared_for_any_number_of_processes():
    state = PartialState()
    own = DataLoader(list(range(10)), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    parts = [prepare_data_loader(own, state.device, 2, process, use_seedable_sampler=True) for process in (0, 1)]
    assert isinstance(parts[0].batch_sampler.batch_sampler.sampler, SeedableRandomSampler)
    assert get_sampler(parts[0]) is parts[0].sampler
    read = [sample for pair in zip(*map(lists, parts), strict=True) for batch in pair for sample in batch]
    assert sorted(read[:10]) == list(range(10))
    with pytest.raises(ValueError, match="put_on_device"):
        prepare_data_loader(own, dispatch_batches=True)
    assert isinstance(prepare_data_loader(own, put_on_device=True, dispatch_batches=True), DataLoaderDispatcher)
    with pytest.raises(UnsupportedError, match="slice_fn"):
        prepare_data_loader(own, slice_fn_for_dispatch=lambda batch, part, **_: batch[part])


def test_a_seedable_sampler_counts_its_epochs_and_crosses_processes():
    sampler = SeedableRandomSampler(range(9), data_seed=5)
    first, second = list(sampler), list(sampler)
    assert sampler.epoch == 2
    copied = pickle.loads(pickle.dumps(SeedableRandomSampler(range(9), data_seed=5)))
    copied.set_epoch(1)
    assert list(copied) == second != first
