"""What the adapters share: how they are made, and which of the logged values are numbers and texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyaccel.tracking.tracker import GeneralTracker, RunInfo
from polyaccel.tracking.values import flatten


class Adapter(GeneralTracker):
    """A tracker whose options (`init_kwargs[name]`) go to the vendor's own init function."""

    requires_logging_directory: ClassVar[bool] = False
    takes_files: ClassVar[bool] = True
    package: ClassVar[str]  # what is imported
    requirement: ClassVar[str]  # what is installed

    def __init__(self, run_name: str, **options: Any) -> None:
        self.run_name = run_name
        self.options = options
        self._vendor: Any = None

    @property
    def tracker(self) -> Any:
        """The vendor's own run object."""
        return self._vendor

    @property
    def info(self) -> RunInfo:
        """The run, which is known from `start` on."""
        assert self.run is not None
        return self.run


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among logged values, nested names joined by "/"; True and False count as 1 and 0."""
    return {
        name: float(value) if not isinstance(value, int) else int(value)
        for name, value in flatten(values, "/").items()
        if isinstance(value, (int, float))
    }


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """The texts among logged values."""
    return {name: value for name, value in flatten(values, "/").items() if isinstance(value, str)}
