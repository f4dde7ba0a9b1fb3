"""The engines that are open in this process. The newest one is the job that global helpers (loggers, seeds, state classes) speak of."""

from __future__ import annotations

import weakref

from polyaccel.protocols import Engine

_engines: list[weakref.ref[Engine]] = []


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


def forget() -> None:
    """Start over, as if no Accelerator had been made; the engines themselves stay open."""
    _engines.clear()
