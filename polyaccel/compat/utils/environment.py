"""`accelerate.utils.environment`: reads and temporarily changes this process's environment, for scripts and their tests."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from polyaccel.compat.utils.imports import check_cuda_fp8_capability

__all__ = [
    "are_libraries_initialized",
    "check_cuda_fp8_capability",
    "clear_environment",
    "convert_dict_to_env_variables",
    "get_int_from_env",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "purge_accelerate_environment",
    "str_to_bool",
]

log = logging.getLogger("polyaccel.utils.environment")

_TRUE = frozenset({"y", "yes", "t", "true", "on", "1"})
_FALSE = frozenset({"n", "no", "f", "false", "off", "0"})
_PURGED = ("ACCELERATE_", "POLYACCEL_")
_IS_PURGED = "_polyaccel_is_purged"


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """1 for y, yes, t, true, on and 1, 0 for n, no, f, false, off and 0, in any case; with `to_bool` True and False.

    Raises ValueError for anything else.
    """
    word = value.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{value!r} is neither of {', '.join(sorted(_TRUE))} nor of {', '.join(sorted(_FALSE))}")
    truth = word in _TRUE
    return truth if to_bool else int(truth)


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """The first of these variables that holds a number from 0 on, or the default."""
    values = (int(os.environ.get(key, -1)) for key in env_keys)
    return next((value for value in values if value >= 0), default)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Whether a variable says yes; see `str_to_bool`."""
    return bool(str_to_bool(os.environ.get(key, str(default))))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """The text of a variable, or the default."""
    return os.environ.get(key, str(default))


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those of the libraries that this process has imported."""
    return [name for name in library_names if name in sys.modules]


def convert_dict_to_env_variables(current_env: Mapping[str, str]) -> list[str]:
    r"""Lines `NAME=value\n` for a file of variables; an empty one, or one with ; < > a space or a newline, is left out with a warning."""
    lines = []
    for name, value in current_env.items():
        if name and value and not set(name + value) & set(";\n<> "):
            lines.append(f"{name}={value}\n")
        else:
            log.warning("%s=%s is left out: it is empty, or has a character that the file cannot hold", name, value)
    return lines


@contextmanager
def clear_environment() -> Iterator[None]:
    """Inside, no variable is set; afterwards all are as before."""
    before = os.environ.copy()
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Inside, these variables are set, their names in capitals and their values as text; afterwards they are as before."""
    wanted = {name.upper(): str(value) for name, value in kwargs.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        _restore(before)


def _restore(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _kept() -> Iterator[None]:
    before = {name: value for name, value in os.environ.items() if name.startswith(_PURGED)}
    try:
        yield
    finally:
        now = [name for name in os.environ if name.startswith(_PURGED)]
        _restore({name: before.get(name) for name in {*now, *before}})


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorator: ACCELERATE_* and POLYACCEL_* variables are as before when the function, or a test method of the class, returns."""
    if not isinstance(func_or_cls, type):
        return _purged(func_or_cls)
    decorated: Any = func_or_cls
    _purge_tests(decorated)

    def purge_subclass(cls: Any, **kwargs: Any) -> None:
        super(decorated, cls).__init_subclass__(**kwargs)
        _purge_tests(cls)

    hook: Any = purge_subclass
    decorated.__init_subclass__ = classmethod(hook)
    return decorated


def _purged(function: Any) -> Any:
    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        with _kept():
            return function(*args, **kwargs)

    setattr(kept, _IS_PURGED, True)
    return kept


def _purge_tests(cls: type) -> None:
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if not name.startswith("test") or hasattr(method, _IS_PURGED):
            continue
        if isinstance(method, types.FunctionType):
            setattr(cls, name, _purged(method))
        elif isinstance(method, staticmethod) and not hasattr(method.__func__, _IS_PURGED):
            setattr(cls, name, staticmethod(_purged(method.__func__)))
