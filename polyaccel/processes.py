"""Which process does what: decorators and contexts of Accelerate's names, on a Topology and a barrier."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from polyaccel.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def only_if(condition: Callable[[], bool], function: Callable[P, R]) -> Callable[P, R | None]:
    """`function`, run only where `condition()` holds at the time of the call; None elsewhere."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if condition() else None

    return wrapped


class MainProcessOnly:
    """`accelerator.on_main_process`: a decorator, and a context for calls on an unwrapped tracker.

    `@on_main_process` runs a function on process 0 only. The body of `with on_main_process:` runs on every process, as Python has no
    other way: off the main process `get_tracker` gives an object that absorbs every call, so that the body does nothing there. The
    context gives whether this is the main process.
    """

    def __init__(self, is_main_process: Callable[[], bool]) -> None:
        self._is_main_process = is_main_process

    def __call__(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """The decorator."""
        return only_if(self._is_main_process, function)

    def __enter__(self) -> bool:
        return self._is_main_process()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class Trigger:
    """A flag that any process raises and that all of them see once. `any_process` tells whether it is up anywhere."""

    def __init__(self, any_process: Callable[[bool], bool]) -> None:
        self._any_process = any_process
        self._is_set = False

    def set(self) -> None:
        """Raise it here."""
        self._is_set = True

    def check(self) -> bool:
        """Whether it is up on any process; then it is down on all of them. Every process must call it."""
        found = self._any_process(self._is_set)
        self._is_set = self._is_set and not found
        return found


@contextmanager
def one_first(is_first: bool, barrier: Callable[[str], None]) -> Iterator[None]:
    """The first process runs the block, then all others do. Every process must enter it."""
    if not is_first:
        barrier("polyaccel.one_first")
    try:
        yield
    finally:
        if is_first:
            barrier("polyaccel.one_first")  # also after an exception: the others must not wait for ever


def split(inputs: Any, *, index: int, num_processes: int, apply_padding: bool) -> Any:
    """This process's part of `inputs`: a list, tuple, array, dict of such, or anything with a length and slices.

    The first `len % num_processes` processes get one more; with `apply_padding` the last item is repeated so that all parts are
    equally long. The input is not changed.
    """
    if num_processes == 1:
        return inputs
    if isinstance(inputs, Mapping):
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(
                f"split_between_processes got a dict whose values differ in length: {lengths}",
                "make all values equally long",
            )
        return {
            name: split(value, index=index, num_processes=num_processes, apply_padding=apply_padding)
            for name, value in inputs.items()
        }
    try:
        length = len(inputs)
        inputs[0:0]
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"split_between_processes cannot cut a {type(inputs).__name__}",
            "pass a list, tuple, array, dataset or dict of them",
        ) from error
    share, extra = divmod(length, num_processes)
    start = index * share + min(index, extra)
    stop = start + share + (index < extra)
    # A Hugging Face dataset, whose slices are dicts of columns.
    if hasattr(inputs, "select") and hasattr(inputs, "column_names"):
        padding = share + (extra > 0) - (stop - start) if apply_padding else 0
        return inputs.select([*range(start, stop), *[length - 1] * (padding if length else 0)])
    part = inputs[start:stop]
    missing = share + (extra > 0) - len(part)
    if not apply_padding or not missing or not length:
        return part
    last = inputs[length - 1 : length]
    if isinstance(part, (list, tuple, str)):
        return part + last * missing
    return _concatenate_rows([part, *[last] * missing])


def _concatenate_rows(parts: list[Any]) -> Any:
    """Rows of one array type put together, by the array's own framework."""
    first = parts[0]
    if hasattr(first, "new_empty"):  # torch: the one array type whose namespace is not reachable from the array
        result = first.new_empty((sum(len(part) for part in parts), *first.shape[1:]))
        start = 0
        for part in parts:
            result[start : start + len(part)] = part
            start += len(part)
        return result
    return first.__array_namespace__().concatenate(parts)  # numpy and jax arrays know their namespace
