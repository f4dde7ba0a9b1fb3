"""What processes say of their calls to each other: two of them in one, on a store in memory."""

import sys
import time

import pytest

from polyaccel import collective_calls
from polyaccel.collective_calls import CollectiveCalls, call_site
from polyaccel.errors import CollectiveError
from polyaccel.store import MemoryStore


class Process(CollectiveCalls):
    """One of a job of two; `exchanges` counts what its training has begun."""

    def __init__(self, index, store, **options):
        self.exchanges = 0
        super().__init__(index, 2, open_store=lambda: store, num_exchanges=lambda: self.exchanges, **options)
        self._prefix = "job"  # both are the first job of their process

    def is_at(self, operation, detail=""):
        """Begins an operation, and does not complete it."""
        return self(operation, detail).__enter__()


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(collective_calls, "_ANSWER_S", 0.02)
    monkeypatch.setattr(collective_calls, "_STUCK_S", 0.2)
    store = MemoryStore()
    processes = Process(0, store, timeout_s=1.0), Process(1, store, timeout_s=1.0)
    yield processes
    for process in processes:
        process.close()


def look_for(process, seconds):
    """What an engine does while it waits so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process.look()
        time.sleep(0.02)


def test_a_thread_in_no_call_is_at_its_line():
    name, place = call_site(sys._getframe())
    assert name == ""
    assert place.rpartition(":")[0].endswith("test_collective_calls.py")


def test_a_slow_process_is_no_error_before_the_deadline_which_says_where_it_is(job):
    slow, waiting = job
    waiting.is_at("barrier")
    look_for(waiting, 0.6)
    assert not waiting.is_broken
    with pytest.raises(CollectiveError, match=r"has waited 1 s \(timeout_s\) for process 0: process 0 is at .*:\d+"):
        look_for(waiting, 1.0)
    assert waiting.is_broken
    assert not slow.is_broken


def test_processes_at_one_operation_wait_for_its_end(job):
    for process in job:
        process.timeout_s = 60
        process.is_at("all_gather", "(2,) float32")
    look_for(job[0], 0.5)


def test_processes_that_stay_at_different_operations_wait_in_vain(job):
    job[0].is_at("all_gather", "(2,) float32")
    job[1].is_at("all_gather", "(3,) float32")
    with pytest.raises(CollectiveError, match=r"different collectives .*\(2,\) float32.*process 1.*\(3,\) float32"):
        look_for(job[0], 0.9)


def test_a_process_that_waits_in_training_waits_in_vain_and_one_that_trains_on_does_not(job):
    waiting, training = job
    waiting.timeout_s = 60
    waiting.is_at("barrier")
    for _ in range(10):  # ahead, but it gets further: its exchanges do not need the waiting one
        training.exchanges += 1
        look_for(waiting, 0.1)
    with pytest.raises(CollectiveError, match=r"called by process 0 only: process 1 has gone on to .*:\d+"):
        look_for(waiting, 1.0)


def test_a_process_that_ended_before_is_named_and_one_that_ended_after_is_not(job):
    first, second = job
    first.is_at("barrier")
    with second("barrier"):
        pass
    second.close("has ended")
    look_for(first, 0.2)
    with first:
        pass
    first.is_at("barrier")
    with pytest.raises(CollectiveError, match="waits for process 1, which has ended"):
        first.look()


def test_a_failed_exchange_is_explained_by_the_process_that_left(job):
    job[0].is_at("barrier")
    job[1].close()
    assert "waits for process 1, which has left the job" in str(job[0].failed(RuntimeError("connection reset")))


def test_without_a_store_the_deadline_holds():
    def refuse():
        raise NotImplementedError("no clone")

    alone = CollectiveCalls(0, 2, timeout_s=0.05, open_store=refuse)
    alone("barrier")
    time.sleep(0.06)
    with pytest.raises(CollectiveError, match="process 1 does not answer"):
        alone.look()
