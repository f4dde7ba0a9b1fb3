"""Who does what, as rank i of n, without starting processes."""

import numpy as np
import pytest

from polyaccel import processes
from polyaccel.errors import ConfigError


def parts(inputs, n, padding=False):
    return [processes.split(inputs, index=i, num_processes=n, apply_padding=padding) for i in range(n)]


def test_the_first_processes_get_one_more():
    assert parts(list("abcde"), 3) == [["a", "b"], ["c", "d"], ["e"]]
    assert parts((1, 2, 3), 2) == [(1, 2), (3,)]


def test_padding_repeats_the_last_item():
    assert parts([1, 2, 3], 2, padding=True) == [[1, 2], [3, 3]]
    assert parts([1], 3, padding=True) == [[1], [1], [1]]


def test_arrays_are_cut_and_padded_along_their_rows():
    first, second = parts(np.arange(6).reshape(3, 2), 2, padding=True)
    np.testing.assert_array_equal(first, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(second, [[4, 5], [4, 5]])


def test_a_dict_is_cut_value_by_value_and_not_changed():
    inputs = {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert parts(inputs, 2)[1] == {"a": [3], "b": [6]}
    assert inputs == {"a": [1, 2, 3], "b": [4, 5, 6]}


class Rows:
    """A Hugging Face dataset: its slices are dicts of columns."""

    column_names = ("k",)

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return {"k": self.rows[item]}

    def select(self, indices):
        return Rows(self.rows[index] for index in indices)


def test_a_dataset_is_cut_by_rows_and_stays_a_dataset():
    assert [part.rows for part in parts(Rows("abc"), 2)] == [["a", "b"], ["c"]]
    assert [part.rows for part in parts(Rows("abc"), 2, padding=True)] == [["a", "b"], ["c", "c"]]
    assert [part.rows for part in parts(Rows(""), 2, padding=True)] == [[], []]


def test_one_process_keeps_the_object_itself():
    inputs = {"a": [1]}
    assert processes.split(inputs, index=0, num_processes=1, apply_padding=False) is inputs


def test_unequal_lengths_and_uncuttable_values_are_refused():
    with pytest.raises(ConfigError, match="differ in length"):
        parts({"a": [1], "b": [1, 2]}, 2)
    with pytest.raises(ConfigError, match="cannot cut a int"):
        parts(3, 2)


def test_the_first_process_releases_the_others_even_when_it_fails():
    barriers = []
    with pytest.raises(RuntimeError), processes.one_first(True, barriers.append):
        raise RuntimeError
    assert barriers == ["polyaccel.one_first"]


def test_a_decorated_function_keeps_its_name_and_returns_none_elsewhere():
    def work():
        """Doc."""
        return 1

    here, elsewhere = processes.only_if(lambda: True, work), processes.only_if(lambda: False, work)
    assert (here(), elsewhere(), here.__name__, here.__doc__) == (1, None, "work", "Doc.")


def test_a_trigger_is_seen_once_by_all_and_stays_up_until_it_is_seen():
    flags = {}

    def any_process(index):
        def exchange(flag):  # of two processes that check one after the other in this one
            flags[index] = flag
            return any(flags.values())

        return exchange

    first, second = (processes.Trigger(any_process(index)) for index in range(2))
    second.set()
    flags[1] = True
    assert [first.check(), second.check()] == [True, True]
    assert [second.check(), first.check()] == [False, False]
