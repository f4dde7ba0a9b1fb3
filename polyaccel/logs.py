"""Loggers that know in which process they are: one line per job instead of one per process, or one process after the other."""

from __future__ import annotations

import functools
import logging
from collections.abc import MutableMapping
from typing import Any

from polyaccel import jobs
from polyaccel.config.resolve import inherited_environment
from polyaccel.errors import NotStartedError


class ProcessLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take `main_process_only` (default True) and `in_order` (default False). See `get_logger`."""

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log on the main process; with `main_process_only=False` on every process, with `in_order=True` one after the other.

        `in_order=True` must be reached by every process, whatever its level. Raises NotStartedError (a RuntimeError) before the first
        Accelerator.
        """
        engine = jobs.current()
        if engine is None:
            raise NotStartedError(
                f"the logger {self.logger.name!r} does not know its process yet",
                "make the Accelerator (or a PartialState) first, then log",
            )
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        kwargs.setdefault("stacklevel", 2)  # the line that logs, not this one
        place = engine.topology
        enabled = self.isEnabledFor(level)
        if not in_order:
            if enabled and (place.is_main_process or not main_process_only):
                self._write(level, msg, args, kwargs)
            return
        for index in range(place.num_processes):
            if enabled and index == place.process_index:
                self._write(level, msg, args, kwargs)
            engine.collectives.barrier("polyaccel.logs.in_order")

    def _write(self, level: int, msg: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs["stacklevel"] += 1
        text, kwargs = self.process(str(msg), kwargs)  # type: ignore[assignment]
        self.logger.log(level, text, *args, **kwargs)

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        """In a job of several processes, the process in front of the message."""
        engine = jobs.current()
        if engine is None or engine.topology.num_processes == 1:
            return msg, kwargs
        return f"[RANK {engine.topology.process_index}] {msg}", kwargs

    @functools.cache  # noqa: B019 - a logger lives as long as its module
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """`warning`, for the first of equal calls only."""
        kwargs.setdefault("stacklevel", 3)
        self.warning(*args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> ProcessLogger:
    """A logger for use in all processes: by default only the main one writes.

    Args:
        name: of the logger, usually `__name__`.
        log_level: such as "INFO"; None: `POLYACCEL_LOG_LEVEL` or `ACCELERATE_LOG_LEVEL`, where one is set.

    May be called before the Accelerator exists; logging may not. Same name and meaning as `accelerate.logging.get_logger`.
    """
    variables = inherited_environment()
    level = log_level or variables.get("POLYACCEL_LOG_LEVEL") or variables.get("ACCELERATE_LOG_LEVEL")
    logger = logging.getLogger(name)
    if level is not None:
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return ProcessLogger(logger, {})
