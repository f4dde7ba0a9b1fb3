"""The engines that are open in this process. The newest one is the job that global helpers (loggers, seeds, state classes) speak of."""

from __future__ import annotations

import weakref
from typing import Any

from polyaccel.protocols import Engine

_engines: list[weakref.ref[Engine]] = []
_accelerators: list[weakref.ref[Any]] = []


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


def own(accelerator: Any) -> None:
    """This Accelerator has adopted the newest engine: it is what user code drives it by."""
    _accelerators[:] = [reference for reference in _accelerators if reference() is not None]
    _accelerators.append(weakref.ref(accelerator))


def accelerator() -> Any:
    """The newest Accelerator that is still in use, or None."""
    return next((found for reference in reversed(_accelerators) if (found := reference()) is not None), None)


def forget() -> None:
    """Start over, as if no Accelerator had been made; the engines themselves stay open."""
    _engines.clear()
    _accelerators.clear()
