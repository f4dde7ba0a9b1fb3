"""Every sample is counted once, however batches are cut: processes are threads here, and arrays are numpy's."""

from __future__ import annotations

import threading
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel import wire
from polyaccel.accumulation import GradientState
from polyaccel.data import DataSharding, GlobalRows, IterableShard, PreparedLoader, ShardedBatchSampler
from polyaccel.errors import UnsupportedError
from polyaccel.gathering import Gathering
from polyaccel.metrics import BatchRows

Pair = namedtuple("Pair", "predicted real")


class Between:
    """Collectives between some of the threads."""

    def __init__(self, job: Job, processes: tuple[int, ...]) -> None:
        self.job, self.processes = job, processes
        self.barrier = threading.Barrier(len(processes))
        self.values: dict[int, object] = {}

    def exchange(self, value: object) -> list:
        self.job.num_exchanges += 1
        self.values[self.job.me()] = value
        self.barrier.wait(10)
        everyone = [self.values[process] for process in self.processes]
        self.barrier.wait(10)
        return everyone

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        parts = self.exchange(np.atleast_1d(array))
        assert len({part.shape for part in parts}) == 1, "an engine takes equal shapes only"
        return np.concatenate(parts)

    def all_gather_object(self, value: object) -> list:
        return [wire.decode(part) for part in self.exchange(wire.encode(value))]

    def among(self, processes: tuple[int, ...]) -> Between:
        with self.job.lock:
            return self.job.groups.setdefault(processes, Between(self.job, processes))


class Job:
    """`run(work)` calls `work(gathering, process)` in a thread per process and gives the results."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes, self.num_exchanges = num_processes, 0
        self.lock, self.groups = threading.Lock(), {}
        self.local = threading.local()
        self.everyone = Between(self, tuple(range(num_processes)))

    def me(self) -> int:
        return self.local.process

    def run(self, work) -> list:
        results: list = [None] * self.num_processes

        def run_one(process: int) -> None:
            self.local.process = process
            topology = SimpleNamespace(num_processes=self.num_processes, process_index=process)
            engine = SimpleNamespace(topology=topology, collectives=self.everyone)
            try:
                results[process] = work(Gathering(engine, lambda: None), process)
            except BaseException as error:  # noqa: BLE001 - shown by the test
                results[process] = error
                self.everyone.barrier.abort()

        threads = [threading.Thread(target=run_one, args=(process,)) for process in range(self.num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


class Batches:
    def __init__(self, num_samples: int, batch_size: int, drop_last: bool = False) -> None:
        self.sampler, self.batch_size, self.drop_last = range(num_samples), batch_size, drop_last

    def __iter__(self):
        for start in range(0, len(self.sampler), self.batch_size):
            if (
                len(batch := list(self.sampler[start : start + self.batch_size])) == self.batch_size
                or not self.drop_last
            ):
                yield batch


class Ragged:
    """A batch sampler whose batches have no one size."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


def seen(num_processes, make_batches, value=lambda indices: np.array(indices), **options) -> list[list]:
    """What each process gathered over a pass, batch after batch."""

    def work(gathering: Gathering, process: int) -> list:
        return [
            gathering.gather_for_metrics(value(indices), BatchRows(process, num_processes, rows), **options)
            for indices, rows in make_batches(process)
        ]

    return Job(num_processes).run(work)


def read(sampler: ShardedBatchSampler):
    for indices in sampler:
        yield indices, sampler.rows.popleft()


cuts = {
    "num_samples": st.integers(1, 40),
    "batch_size": st.integers(1, 5),
    "processes": st.integers(1, 4),
    "local": st.integers(1, 2),
    "split": st.booleans(),
    "even": st.booleans(),
    "skip": st.integers(0, 2),
}


@given(**cuts)
@settings(max_examples=150, deadline=None)
def test_every_sample_of_an_indexed_dataset_or_a_stream_counts_once(
    num_samples, batch_size, processes, local, split, even, skip
):
    shards = processes * local
    size = batch_size * shards if split else batch_size

    def cut(process: int) -> DataSharding:
        return DataSharding(shards, process * local, local, split_batches=split, even_batches=even)

    def indexed(process: int):
        sampler = ShardedBatchSampler(Batches(num_samples, size), cut(process))
        sampler.skip_next(skip)
        return read(sampler)

    def streamed(process: int):
        return list(IterableShard(range(num_samples), cut(process), batch_size=size))[skip:]

    for batches in (indexed, streamed):
        for value in (np.array, lambda indices: [str(index) for index in indices]):
            everyone = seen(processes, batches, value)
            main = [int(sample) for batch in everyone[0] for sample in batch]
            assert main == list(range(min(skip * batch_size * shards, num_samples), num_samples))
            for process in everyone[1:]:  # one that ran out of samples earlier has seen the beginning
                assert [int(s) for batch in process for s in batch] == main[: sum(map(len, process))]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), processes=st.integers(1, 3), even=st.booleans())
@settings(max_examples=80, deadline=None)
def test_batches_of_changing_sizes_count_once_too(sizes, processes, even):
    def ragged(process: int):
        return read(ShardedBatchSampler(Ragged(sizes), DataSharding(processes, process, 1, even_batches=even)))

    assert np.concatenate(seen(processes, ragged)[0]).tolist() == list(range(sum(sizes)))


def last_batch(num_processes, value, rows, **options) -> list:
    """The last of 22 samples, in batches of 4 per process."""
    return Job(num_processes).run(
        lambda gathering, process: gathering.gather_for_metrics(
            value(process), BatchRows(process, num_processes, rows), **options
        )
    )


COMPLETED = GlobalRows((4, 4), 6, 4)


def test_containers_and_what_is_no_array_keep_their_structure():
    tree = last_batch(
        2,
        lambda process: {
            "pair": Pair(np.arange(4) + 4 * process, np.zeros((4, 2))),
            "text": [f"{process}{row}" for row in range(4)],
            "process": process,
        },
        COMPLETED,
    )[1]
    assert tree["pair"].predicted.tolist() == [0, 1, 2, 3, 4, 5]
    assert tree["pair"].real.shape == (6, 2)
    assert tree["text"] == ["00", "01", "02", "03", "10", "11"]
    assert tree["process"] == [0, 1]


def test_a_list_of_objects_is_joined_and_a_tuple_of_lists_stays_one():
    rows = [{"id": "a"}, {"id": "b"}, {"id": "c"}, {"id": "d"}]
    assert last_batch(2, lambda process: rows, COMPLETED)[0] == [*rows, *rows[:2]]
    texts = last_batch(2, lambda process: (["p"] * 4, ["r"] * 4), COMPLETED)[0]
    assert texts == (["p"] * 6, ["r"] * 6)
    assert last_batch(2, lambda process: "abcd", None)[0] == ["abcd", "abcd"]


def test_arrays_of_different_shapes_travel_as_objects():
    boxes = last_batch(2, lambda process: [np.ones((row + process, 4)) for row in range(4)], COMPLETED, as_objects=True)
    assert [box.shape[0] for box in boxes[0]] == [0, 1, 2, 3, 1, 2]
    rows = last_batch(2, lambda process: np.arange(4) + 4 * process, COMPLETED, as_objects=True)[0]
    assert [int(row) for row in rows] == [0, 1, 2, 3, 4, 5]


def test_several_rows_per_sample_and_one_value_per_process_are_cut_as_their_samples():
    tokens = last_batch(2, lambda process: np.arange(12) + 12 * process, COMPLETED)[0]
    assert tokens.tolist() == list(range(18))
    nothing_real_on_the_second = GlobalRows((4, 4), 3, 4)
    assert last_batch(2, lambda process: np.float32(process), nothing_real_on_the_second)[0].tolist() == [0.0]
    assert last_batch(2, lambda process: np.full(1, process), COMPLETED)[0].tolist() == [0, 1]


def test_a_loss_repeated_for_every_row_of_a_whole_batch_weighs_as_the_rows_that_are_there():
    short = GlobalRows((2,), 2, 4)
    assert last_batch(1, lambda process: np.ones(4), short)[0].shape == (2,)
    uneven = GlobalRows((4, 2), 6, 4)
    assert last_batch(2, lambda process: np.full(4, process), uneven)[0].tolist() == [0, 0, 0, 0, 1, 1]


def test_rows_that_cannot_be_told_apart_are_refused():
    with pytest.raises(UnsupportedError, match=r"shape \(7,\) of 7 rows for a batch of 4 samples, of which 2"):
        Job(2).run(
            lambda g, process: g.gather_for_metrics(np.zeros(7), BatchRows(process, 2, GlobalRows((4, 4), 2, 4)))
        )


def test_values_of_a_batch_whose_loop_was_left_are_cut_only_where_they_are_its_rows():
    batch = BatchRows(0, 1, GlobalRows((4,), 3, 4), is_left=True)
    gathering = Gathering(SimpleNamespace(topology=SimpleNamespace(num_processes=1)), lambda: None)
    assert gathering.gather_for_metrics(np.arange(4), batch).tolist() == [0, 1, 2]
    assert gathering.gather_for_metrics(np.arange(12), batch).shape == (12,)


def test_nothing_is_exchanged_to_find_out_what_is_real():
    job = Job(2)
    job.run(lambda g, process: g.gather_for_metrics(np.zeros(4), BatchRows(process, 2, COMPLETED)))
    assert job.num_exchanges == 2, "one gather of two processes"
    alone = Job(2)
    uneven = GlobalRows((3, 0), 3, 4)
    alone.run(lambda g, process: process or g.gather_for_metrics(np.zeros(3), BatchRows(process, 2, uneven)))
    assert alone.num_exchanges == 0


def test_the_batch_in_use_is_that_of_the_innermost_loop_or_of_one_that_was_left_within_it():
    state = GradientState(1)
    outer, inner = loader_of(5, 2, state), loader_of(7, 4, state)
    found = []
    for _ in outer:
        found.append(state.batch_rows[0])
        for _ in inner:
            found.append(state.batch_rows[0])
        found.append(state.batch_rows[0])  # the outer one again
    short_outer, short_inner = GlobalRows((1,), 1, 2), GlobalRows((3,), 3, 4)
    whole = [None, None, short_inner, None]
    assert found == [*whole, *whole, short_outer, None, short_inner, short_outer]

    batches = iter(loader_of(3, 4, state))
    next(batches)
    del batches  # `next(iter(loader))`, whose loop ends at once
    assert state.batch_rows == (short_inner, True)
    for number, _ in enumerate(outer):
        if number == 1:
            next(iter(inner))
            assert state.batch_rows == (None, True), "a full batch of the inner one"
        if number == 2:
            assert state.batch_rows == (short_outer, False), "the outer one has handed out another batch"


def loader_of(num_samples: int, batch_size: int, state: GradientState) -> PreparedLoader:
    class Host:
        loader, seed = None, None
        sampler = ShardedBatchSampler(Batches(num_samples, batch_size), DataSharding())

        def __init__(self) -> None:
            self.batch_size = self.total_batch_size = batch_size

        def set_epoch(self, epoch: int) -> None:
            pass

        def read(self, skip: int = 0, seed: int | None = None):
            return read(self.sampler)

    return PreparedLoader(Host(), observer=state)
