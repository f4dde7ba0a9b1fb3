"""Which sample goes to which data shard: the tables of Hugging Face Accelerate, and what must hold for every size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.data import DataSharding, GlobalRows, IterableShard, ShardedBatchSampler
from polyaccel.errors import PrepareError


class Batches:
    """A batch sampler over 0 .. num_samples, as torch's BatchSampler over a sequential sampler."""

    def __init__(self, num_samples: int, batch_size: int, drop_last: bool = False) -> None:
        self.sampler, self.batch_size, self.drop_last = range(num_samples), batch_size, drop_last

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self):
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield list(self.sampler[start : start + self.batch_size])


class Lists:
    """A batch sampler that has no batch_size: its batches are what they are."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def shards(batches, num_shards: int, **options) -> list[list[list[int]]]:
    """What each of `num_shards` processes with one shard reads."""
    samplers = [ShardedBatchSampler(batches, DataSharding(num_shards, i, 1, **options)) for i in range(num_shards)]
    read = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(part) for part in read]
    return read


def test_twenty_two_samples_on_two_shards_end_with_the_first_two_again():
    first, second = shards(Batches(22, 4), 2)
    assert first == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    assert second == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 0, 1]]


def test_drop_last_leaves_out_what_not_every_shard_can_get():
    first, second = shards(Batches(22, 4, drop_last=True), 2)
    assert first == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert second == [[4, 5, 6, 7], [12, 13, 14, 15]]


def test_uneven_batches_may_leave_a_shard_without_a_last_batch():
    assert shards(Batches(3, 1), 2, even_batches=False) == [[[0], [2]], [[1]]]
    assert shards(Batches(7, 2), 2, even_batches=False) == [[[0, 1], [4, 5]], [[2, 3], [6]]]


def test_fewer_samples_than_one_global_batch_are_repeated_as_often_as_needed():
    assert shards(Batches(2, 3), 3) == [[[0, 1, 0]], [[1, 0, 1]], [[0, 1, 0]]]


def test_split_batches_cuts_every_batch():
    first, second = shards(Batches(10, 4), 2, split_batches=True)
    assert first == [[0, 1], [4, 5], [8, 9]]
    assert second == [[2, 3], [6, 7], [0, 1]]


def test_split_batches_that_are_not_completed():
    first, second = shards(Batches(9, 4), 2, split_batches=True, even_batches=False)
    assert first == [[0, 1], [4, 5], [8]]
    assert second == [[2, 3], [6, 7]]


def test_a_batch_that_cannot_be_split_evenly_is_refused_with_both_numbers():
    with pytest.raises(PrepareError, match=r"batch_size=6 over 4 data shards") as caught:
        ShardedBatchSampler(Batches(24, 6), DataSharding(4, 0, 1, split_batches=True))
    assert "multiple of 4" in caught.value.hint


def test_batches_without_a_fixed_size_are_completed_with_whole_batches():
    sampler = Lists([0, 1, 2], [3], [4, 5])
    assert shards(sampler, 2) == [[[0, 1, 2], [4, 5]], [[3], [0, 1, 2]]]
    assert shards(sampler, 2, even_batches=False) == [[[0, 1, 2], [4, 5]], [[3]]]


def test_one_shard_passes_every_batch_through():
    assert shards(Batches(5, 2), 1) == [[[0, 1], [2, 3], [4]]]


def test_a_process_with_two_shards_reads_both_of_them_in_shard_order():
    sampler = ShardedBatchSampler(Batches(22, 4), DataSharding(2, 0, 2))
    assert list(sampler)[-1] == [16, 17, 18, 19, 20, 21, 0, 1]


def test_rows_count_the_real_samples_of_a_completed_or_short_global_batch():
    sampler = ShardedBatchSampler(Batches(22, 4), DataSharding(2, 1, 1))
    assert len(list(sampler)) == 3
    assert list(sampler.rows) == [None, None, GlobalRows((4, 4), 6, 4)]
    short = ShardedBatchSampler(Batches(5, 2), DataSharding())
    assert len(list(short)) == 3
    assert list(short.rows) == [None, None, GlobalRows((1,), 1, 2)]


def test_the_next_pass_can_begin_at_any_batch():
    sampler = ShardedBatchSampler(Batches(22, 4), DataSharding(2, 1, 1))
    whole = list(sampler)
    sampler.skip_next(2)
    assert list(sampler) == whole[2:]
    assert list(sampler.rows) == [GlobalRows((4, 4), 6, 4)]
    assert list(sampler) == whole, "only the next pass is shortened"


def test_set_epoch_reaches_the_batch_sampler_and_its_sampler():
    class Recorder(Batches):
        epoch = None

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    batches = Recorder(4, 2)
    batches.sampler = Recorder(4, 1)
    ShardedBatchSampler(batches, DataSharding()).set_epoch(3)
    assert (batches.epoch, batches.sampler.epoch) == (3, 3)


def test_a_stream_is_cut_like_an_indexed_dataset():
    read = [list(IterableShard(range(22), DataSharding(2, i, 1), batch_size=4)) for i in range(2)]
    rows = GlobalRows((4, 4), 6, 4)
    assert read[0] == [([0, 1, 2, 3], None), ([8, 9, 10, 11], None), ([16, 17, 18, 19], rows)]
    assert read[1] == [([4, 5, 6, 7], None), ([12, 13, 14, 15], None), ([20, 21, 0, 1], rows)]


def test_a_stream_of_whole_batches_is_dealt_out():
    batches = [["a", "b"], ["c", "d"], ["e", "f"], ["g"], ["h", "i"]]
    read = [list(IterableShard(batches, DataSharding(2, i, 1), batch_size=None)) for i in range(2)]
    assert read[0] == [
        ([["a", "b"]], None),
        ([["e", "f"]], GlobalRows((2, 1), 3)),
        ([["h", "i"]], GlobalRows((2, 2), 2)),
    ]
    assert read[1] == [([["c", "d"]], None), ([["g"]], GlobalRows((2, 1), 3)), ([["a", "b"]], GlobalRows((2, 2), 2))]


def test_every_process_knows_its_real_rows_which_come_first():
    rows = GlobalRows((4, 4, 4), 6, 4)
    assert [rows.real(process) for process in range(3)] == [4, 2, 0]


sizes = {
    "num_samples": st.integers(1, 60),
    "batch_size": st.integers(1, 6),
    "num_shards": st.integers(1, 5),
    "drop_last": st.booleans(),
}


@given(**sizes)
@settings(max_examples=300, deadline=None)
def test_every_sample_is_a_real_one_exactly_once_and_all_shards_have_equal_batches(
    num_samples, batch_size, num_shards, drop_last
):
    samplers = [
        ShardedBatchSampler(Batches(num_samples, batch_size, drop_last), DataSharding(num_shards, i, 1))
        for i in range(num_shards)
    ]
    read = [list(sampler) for sampler in samplers]
    assert {len(part) for part in read} == {len(samplers[0])}
    if num_shards > 1:
        assert {len(batch) for part in read for batch in part} <= {batch_size}
    seen: list[int] = []
    for step, rows in zip(zip(*read, strict=True), samplers[0].rows, strict=True):
        assert rows is None or rows.held == tuple(map(len, step))
        for process, part in enumerate(step):
            seen += part if rows is None else part[: rows.real(process)]
    expected = num_samples - num_samples % (batch_size * num_shards) if drop_last else num_samples
    assert seen == list(range(expected))


@given(num_samples=st.integers(1, 80), global_size=st.sampled_from([4, 8, 12]), drop_last=st.booleans())
@settings(max_examples=200, deadline=None)
def test_global_batches_do_not_depend_on_the_number_of_shards(num_samples, global_size, drop_last):
    def global_batches(num_shards: int) -> list[tuple[list[int], int | None]]:
        batches = Batches(num_samples, global_size // num_shards, drop_last)
        samplers = [ShardedBatchSampler(batches, DataSharding(num_shards, i, 1)) for i in range(num_shards)]
        steps = [list(itertools.chain(*step)) for step in zip(*samplers, strict=True)]
        real = [None if rows is None else rows.num_real for rows in samplers[0].rows]
        return list(zip(steps, real, strict=True))

    two, four = global_batches(2), global_batches(4)
    assert two == four


@given(split=st.booleans(), even=st.booleans(), local=st.integers(1, 3), processes=st.integers(1, 3), **sizes)
@settings(max_examples=300, deadline=None)
def test_a_process_with_several_shards_reads_what_as_many_processes_would(
    split, even, local, processes, num_samples, batch_size, num_shards, drop_last
):
    num_shards = local * processes
    batches = Batches(num_samples, batch_size * num_shards if split else batch_size, drop_last)
    options = {"split_batches": split, "even_batches": even}
    single = [list(ShardedBatchSampler(batches, DataSharding(num_shards, i, 1, **options))) for i in range(num_shards)]
    for process in range(processes):
        joined = list(ShardedBatchSampler(batches, DataSharding(num_shards, process * local, local, **options)))
        parts = itertools.zip_longest(*single[process * local : (process + 1) * local], fillvalue=[])
        assert joined == [list(itertools.chain(*part)) for part in parts]


@given(split=st.booleans(), even=st.booleans(), **sizes)
@settings(max_examples=300, deadline=None)
def test_shards_are_those_of_accelerate(split, even, num_samples, batch_size, num_shards, drop_last):
    upstream = pytest.importorskip("accelerate.data_loader", exc_type=ImportError)
    if split:
        batch_size *= num_shards
    if num_shards == 1:
        return  # Accelerate does not cut for one process
    ours = shards(Batches(num_samples, batch_size, drop_last), num_shards, split_batches=split, even_batches=even)
    theirs = [
        list(
            upstream.BatchSamplerShard(
                Batches(num_samples, batch_size, drop_last), num_shards, i, split_batches=split, even_batches=even
            )
        )
        for i in range(num_shards)
    ]
    assert ours == theirs


@given(split=st.booleans(), even=st.booleans(), **sizes)
@settings(max_examples=200, deadline=None)
def test_a_stream_and_an_index_give_the_same_batches(split, even, num_samples, batch_size, num_shards, drop_last):
    if split:
        batch_size *= num_shards
    for index in range(num_shards):
        cut = DataSharding(num_shards, index, 1, split_batches=split, even_batches=even)
        sampler = ShardedBatchSampler(Batches(num_samples, batch_size, drop_last), cut)
        indexed = list(sampler)
        stream = IterableShard(range(num_samples), cut, batch_size=batch_size, drop_last=drop_last)
        assert [batch for batch, _ in stream] == indexed
        assert [rows for _, rows in stream] == list(sampler.rows)
        assert len(stream) == len(sampler) == len(indexed)
