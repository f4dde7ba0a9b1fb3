"""The loader every engine gives to user code: when it knows the end, when it starts transfers, and what it tells its observer."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from polyaccel.data import GlobalRows, LoaderState, PreparedLoader, refuse_prepared
from polyaccel.errors import PrepareError, UnsupportedError


class Host:
    """Seven samples in batches of two; `seed` 5 reverses the order."""

    def __init__(self) -> None:
        self.loader = type("UserLoader", (), {"dataset": range(7), "num_workers": 3})()
        self.batch_size = self.total_batch_size = 2
        self.seed = None
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def read(self, skip: int = 0, seed: int | None = None):
        batches = [([0, 1], None), ([2, 3], None), ([4, 5], None), ([6], GlobalRows((1,), 1, 2))]
        return iter((batches[::-1] if seed == 5 else batches)[skip:])


class Observer:
    def __init__(self) -> None:
        self.running: list[PreparedLoader] = []

    def loader_started(self, loader: PreparedLoader) -> None:
        self.running.append(loader)

    def loader_finished(self, loader: PreparedLoader) -> None:
        self.running.remove(loader)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_the_end_is_known_before_the_body_of_the_last_batch_runs(prefetch):
    loader = PreparedLoader(Host(), prefetch=prefetch)
    seen = [(batch, loader.end_of_dataloader, loader.remainder) for batch in loader]
    assert seen == [([0, 1], False, -1), ([2, 3], False, -1), ([4, 5], False, -1), ([6], True, 1)]


def test_transfers_start_two_batches_ahead_of_the_body():
    placed: list[int] = []
    loader = PreparedLoader(Host(), place=lambda batch: placed.append(batch[0]) or batch, prefetch=2)
    progress = [list(placed) for _ in loader]
    assert progress == [[0, 2, 4], [0, 2, 4, 6], [0, 2, 4, 6], [0, 2, 4, 6]]


def test_lift_sees_the_host_batch_and_the_placed_one_when_it_is_handed_out():
    loader = PreparedLoader(Host(), place=tuple, lift=lambda host, placed: (host, placed))
    assert next(iter(loader)) == ([0, 1], (0, 1))


def test_leaving_a_loop_tells_the_observer_at_once():
    observer = Observer()
    loader = PreparedLoader(Host(), observer=observer)
    for _ in loader:
        assert observer.running == [loader]
        break
    assert observer.running == []


def test_an_error_in_the_body_tells_the_observer_too():
    observer = Observer()
    loader = PreparedLoader(Host(), observer=observer)

    def fail() -> None:
        for _ in loader:
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        fail()
    assert observer.running == []


def test_full_passes_count_the_epoch_up_and_hand_it_to_the_host():
    host = Host()
    loader = PreparedLoader(host)
    for _ in range(2):
        list(loader)
    for _ in loader:
        break
    list(loader)
    assert host.epochs == [0, 1, 2, 2], "a pass that was left begins again"
    loader.set_epoch(7)
    list(loader)
    assert host.epochs[4:] == [7, 7]


def test_a_state_continues_in_the_middle_of_a_pass():
    loader = PreparedLoader(Host())
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state == LoaderState(seed=None, epoch=0, batch=2)
    resumed = PreparedLoader(Host())
    resumed.load_state(loader.state)
    assert list(resumed) == [[4, 5], [6]]
    assert list(resumed) == [[0, 1], [2, 3], [4, 5], [6]]
    assert resumed.state.epoch == 2


def test_a_state_with_a_seed_repeats_the_order_of_its_pass():
    loader = PreparedLoader(Host())
    loader.load_state(LoaderState(seed=5, epoch=1, batch=1))
    assert list(loader) == [[4, 5], [2, 3], [0, 1]]


def test_skipping_leaves_out_the_first_batches_of_every_pass_and_keeps_the_end_right():
    loader = PreparedLoader(Host()).skipping(2)
    assert len(loader) == 2
    for _ in range(2):
        assert [(batch, loader.remainder) for batch in loader] == [([4, 5], -1), ([6], 1)]


def test_attributes_of_the_users_own_loader_can_be_read():
    loader = PreparedLoader(Host())
    assert (loader.dataset, loader.num_workers, loader.total_batch_size, len(loader)) == (range(7), 3, 2, 4)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = loader.no_such_thing


def test_a_prepared_loader_is_refused_the_second_time():
    with pytest.raises(PrepareError, match="prepared already"):
        refuse_prepared(PreparedLoader(Host()))


def test_without_prefetch_a_batch_is_placed_when_it_is_handed_out_and_the_end_is_known_all_the_same():
    placed: list[int] = []
    loader = PreparedLoader(Host(), place=lambda batch: placed.append(batch[0]) or batch, prefetch=0)
    assert [(list(placed), loader.end_of_dataloader) for _ in loader] == [
        ([0], False),
        ([0, 2], False),
        ([0, 2, 4], False),
        ([0, 2, 4, 6], True),
    ]


def test_a_thread_reads_the_same_batches_ahead_and_ends_when_the_loop_is_left():
    def readers() -> int:
        return sum(thread.name == "polyaccel-read-ahead" for thread in threading.enumerate())

    here, background = PreparedLoader(Host()), PreparedLoader(Host(), prefetch=3, in_background=True)
    for _ in range(2):  # passes
        assert [(b, background.end_of_dataloader) for b in background] == [(b, here.end_of_dataloader) for b in here]
    assert readers() == 0

    class Endless(Host):
        def read(self, skip: int = 0, seed: int | None = None):
            return (([number], None) for number in itertools.count(skip))

    loader = PreparedLoader(Endless(), in_background=True)
    for batch in loader:
        if batch == [5]:
            state = loader.state
            break
    assert readers() == 0
    resumed = PreparedLoader(Endless(), in_background=True)
    resumed.load_state(state)
    assert next(iter(resumed)) == [6], "what was read ahead and not handed out is read again"


def test_an_error_while_reading_in_the_background_reaches_the_loop_where_its_batch_was_due():
    class Broken(Host):
        def read(self, skip: int = 0, seed: int | None = None):
            yield from (([number], None) for number in range(4))
            raise OSError("disk")

    batches = iter(PreparedLoader(Broken(), prefetch=1, in_background=True))
    assert [next(batches) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(
        OSError, match="disk"
    ):  # it comes where the batch after the next is asked for, to know the last one
        next(batches)


def test_reading_that_draws_from_the_scripts_generators_is_refused_in_the_background():
    class Noisy(Host):
        def read(self, skip: int = 0, seed: int | None = None):
            return (([random.random()], None) for _ in range(4))

    assert len(list(PreparedLoader(Noisy()))) == 4
    with pytest.raises(UnsupportedError, match="depend on timing"):
        list(PreparedLoader(Noisy(), in_background=True))
