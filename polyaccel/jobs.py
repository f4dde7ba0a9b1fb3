"""The engines that are open in this process. The newest one is the job that global helpers (loggers, seeds, state classes) speak of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from polyaccel.protocols import Engine

_engines: list[weakref.ref[Engine]] = []
_accelerators: list[weakref.ref[Any]] = []
_number = 0  # of the latest Accelerator
_numbered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_kept: Any = None  # an Accelerator that is not the script's: PartialState has opened it
_make: Callable[[], Any] | None = None  # how, where it is to be opened when it is asked for


def adopt(engine: Engine) -> None:
    """An Accelerator has opened this engine."""
    _engines[:] = [reference for reference in _engines if reference() is not None]
    _engines.append(weakref.ref(engine))


def engines() -> list[Engine]:
    """Every engine that is still in use, the oldest first."""
    return [engine for reference in _engines if (engine := reference()) is not None]


def current() -> Engine | None:
    """The newest engine that is still in use, or None before the first Accelerator."""
    found = engines()
    return found[-1] if found else None


def own(accelerator: Any) -> int:
    """This Accelerator has adopted the newest engine: it is what user code drives it by. Returns its number in this process."""
    _accelerators[:] = [reference for reference in _accelerators if reference() is not None]
    _accelerators.append(weakref.ref(accelerator))
    global _number
    _number += 1
    _numbered[_number] = accelerator
    return _number


def keep(make: Callable[[], Any]) -> None:
    """From now on, where there is no Accelerator, `make` gives one. It is kept until `forget`, and is not the script's."""
    global _make
    _make = make


def accelerator() -> Any:
    """The newest Accelerator that is still in use, or None."""
    global _kept
    found = accelerators()
    if not found and _make is not None and _kept is None:
        _kept = _make()
    return found[-1] if found else _kept


def kept() -> Any:
    """The Accelerator that is not the script's, or None."""
    return _kept


def accelerators() -> list[Any]:
    """Every Accelerator that is still in use, the oldest first; the kept one as well."""
    return [found for reference in _accelerators if (found := reference()) is not None]


def of_script() -> Any:
    """The newest Accelerator that the script has made, or None."""
    return next((found for found in reversed(accelerators()) if found is not _kept), None)


def retire() -> None:
    """The Accelerators that were made so far are none of the script's any more."""
    _accelerators[:] = [reference for reference in _accelerators if reference() is _kept is not None]


def numbered(number: int) -> Any:
    """The Accelerator that `own` gave this number, or None."""
    return _numbered.get(number)


def forget() -> None:
    """Start over, as if no Accelerator had been made; the engines themselves stay open."""
    global _kept, _make
    _kept = _make = None
    _engines.clear()
    _accelerators.clear()
