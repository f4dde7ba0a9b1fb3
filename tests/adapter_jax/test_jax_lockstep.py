"""What processes must have alike is compared after 1, 2, 4, 8, 16 calls and then every 32; two threads stand for the processes."""

import threading

import numpy as np
import pytest

from polyaccel.errors import PrepareError
from polyaccel_jax.lockstep import Lockstep


class Exchange:
    """Both give a value and get both."""

    def __init__(self):
        self.given = [None, None]
        self.barrier = threading.Barrier(2, timeout=20)
        self.num_calls = 0

    def of(self, process):
        return _Side(self, process)


class _Side:
    def __init__(self, exchange, process):
        self.exchange, self.process = exchange, process

    def all_gather_object(self, value):
        self.exchange.given[self.process] = value
        self.exchange.barrier.wait()
        both = list(self.exchange.given)
        self.exchange.barrier.wait()
        self.exchange.num_calls += not self.process
        return both

    def all_gather(self, array):
        return np.concatenate(self.all_gather_object(array))


def told(differs_at, *, reads_late=False, calls=100, constants=(("pow(tensor, 2)",),) * 2):
    """Per process the call in which it was told, and what; and how often they exchanged."""
    exchange, found = Exchange(), [None, None]

    def run(process):
        lockstep = Lockstep(exchange.of(process), reads_late=reads_late)
        for call in range(1, calls + 1):
            value = ("float32 of shape (4,)", 7 + (process if call == differs_at else 0))
            try:
                lockstep.note("the loop of Net", constants[process], [value])
            except PrepareError as error:
                found[process] = call, str(error)
                return
        found[process] = calls, "nothing"

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return *found, exchange.num_calls


@pytest.mark.parametrize(("differs_at", "early", "late"), [(1, 1, 1), (3, 4, 5), (5, 8, 9), (40, 64, 65)])
def test_a_difference_is_told_to_all_at_the_next_comparison(differs_at, early, late):
    """Where devices need not be waited for, one call later; never in the first, before which nothing was computed."""
    words = "the loop of Net has an input float32 of shape (4,) with other values on process 1 than on process 0"
    for reads_late, call in ((False, early), (True, late)):
        first, second, _ = told(differs_at, reads_late=reads_late)
        assert first == second
        assert first[0] == call
        assert words in first[1]


def test_equal_calls_are_compared_eight_times_in_a_hundred():
    first, second, exchanges = told(None)
    assert first == second == (100, "nothing")
    assert exchanges == 8


def test_an_operation_that_one_process_alone_has_is_named():
    first, _, _ = told(None, constants=(("mul(tensor, 2)",), ("mul(tensor, 2)", "pow(tensor, 3)")))
    assert "the loop of Net has nothing there on process 0 and pow(tensor, 3) on process 1" in first[1]
