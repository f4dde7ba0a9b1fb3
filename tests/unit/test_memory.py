"""Batch sizes that fit: which are tried, what counts as out of memory, and what the caller is told."""

import pytest

from polyaccel.errors import ConfigError, NoBatchSizeError
from polyaccel.memory import find_executable_batch_size, is_out_of_memory, release_memory


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"),
        MemoryError(),
    ],
)
def test_what_frameworks_say_when_memory_is_gone_is_understood(error):
    assert is_out_of_memory(error)


def test_nine_tenths_are_tried_until_it_fits():
    tried = []

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size, name):
        tried.append(batch_size)
        if batch_size > 80:
            raise RuntimeError("CUDA out of memory.")
        return batch_size, name

    assert train("a run") == (73, "a run")
    assert tried == [128, 115, 103, 92, 82, 73]


def test_the_next_size_may_be_the_users_own():
    sizes = iter([64, 16])

    @find_executable_batch_size(starting_batch_size=128, reduce_batch_size_fn=lambda: next(sizes))
    def train(batch_size):
        if batch_size > 16:
            raise MemoryError
        return batch_size

    assert train() == 16


def test_other_errors_pass_through_at_once():
    tried = []

    @find_executable_batch_size
    def train(batch_size):
        tried.append(batch_size)
        raise ValueError("a mistake of the script")

    with pytest.raises(ValueError, match="a mistake"):
        train()
    assert tried == [128]


def test_where_nothing_fits_the_error_names_the_function_and_the_start():
    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size):
        raise MemoryError

    with pytest.raises(NoBatchSizeError, match="train ran out of memory with every batch size from 2 down") as caught:
        train()
    assert isinstance(caught.value, RuntimeError)


def test_a_batch_size_from_the_caller_is_refused_with_the_right_call():
    @find_executable_batch_size
    def train(batch_size, name):
        return batch_size

    with pytest.raises(TypeError, match=r"call it as train\(name='a run'\)"):
        train(128, "a run")


def test_a_starting_size_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="starting_batch_size='auto'"):
        find_executable_batch_size(lambda batch_size: None, starting_batch_size="auto")


def test_the_failed_attempt_is_gone_before_the_next_begins():
    import weakref

    class Activations:
        pass

    alive = []

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size):
        assert not [reference for reference in alive if reference() is not None]
        held = Activations()
        alive.append(weakref.ref(held))
        if batch_size > 1:
            raise MemoryError

    train()


def test_released_names_are_overwritten_with_none():
    assert release_memory(1, 2) == [None, None]
