"""What processes must have alike is compared after 1, 2, 4, 8, 16 calls and then every 32; two threads stand for the processes."""

import threading

import pytest

from polyaccel.errors import PrepareError
from polyaccel.store import MemoryStore
from polyaccel_jax import lockstep as module
from polyaccel_jax.lockstep import Lockstep


class Store(MemoryStore):
    """That counts what is written."""

    def __init__(self):
        super().__init__()
        self.written = []

    def set(self, key, value):
        self.written.append(key)
        super().set(key, value)


def sides(monkeypatch, store):
    """The Locksteps of two processes that have met: each counts its own."""
    made = []
    for process in (0, 1):
        monkeypatch.setattr(module, "_number", iter([0]))
        made.append(Lockstep(store, process, 2))
    return made


def told(monkeypatch, differs_at, *, calls=100, constants=(("pow(tensor, 2)",),) * 2):
    """Per process the call in which it was told, and what; and the store."""
    store, found = Store(), [None, None]
    meets = threading.Barrier(2, timeout=60)  # as the program of every call does

    def run(process, lockstep):
        for call in range(1, calls + 1):
            value = ("float32 of shape (4,)", 7 + (process if call == differs_at else 0))
            try:
                lockstep.note("the loop of Net", constants[process], [value])
            except PrepareError as error:
                found[process] = call, str(error)
                return
            meets.wait()
        found[process] = calls, "nothing"

    threads = [
        threading.Thread(target=run, args=(process, one)) for process, one in enumerate(sides(monkeypatch, store))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return *found, store


@pytest.mark.parametrize(("differs_at", "noticed"), [(1, 1), (3, 5), (5, 9), (40, 65)])
def test_a_difference_is_told_to_both_in_the_call_after_the_next_comparison(monkeypatch, differs_at, noticed):
    """In the first call at once: nothing has been computed before it."""
    words = "the loop of Net has an input float32 of shape (4,) with other values on process 1 than on process 0"
    first, second, _ = told(monkeypatch, differs_at)
    assert first == second
    assert first[0] == noticed
    assert words in first[1]


def test_equal_calls_are_compared_eight_times_in_a_hundred_and_leave_two_texts_of_each_process(monkeypatch):
    first, second, store = told(monkeypatch, None)
    assert first == second == (100, "nothing")
    assert len(store.written) == 2 * 8
    assert len(set(store.written)) == 2 * 2


def test_an_operation_that_one_process_alone_has_is_named(monkeypatch):
    first, _, _ = told(monkeypatch, None, constants=(("mul(tensor, 2)",), ("mul(tensor, 2)", "pow(tensor, 3)")))
    assert "the loop of Net has nothing there on process 0 and pow(tensor, 3) on process 1" in first[1]


def test_a_process_that_stays_away_is_compared_when_it_comes(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    first, second = sides(monkeypatch, Store())
    for _ in range(5):
        first.note("the loop of Net", (), [("a number", 1)])
    second.note("the loop of Net", (), [("a number", 1)])
    second.note("the loop of Net", (), [("a number", 2)])
    with pytest.raises(PrepareError, match=r"in one of the calls 1 to 2 \(the last is the loop of Net\)"):
        second.note("the loop of Net", (), [("a number", 1)])
    first.note("the loop of Net", (), [("a number", 1)])  # nothing to compare the fourth call with
