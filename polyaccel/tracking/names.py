"""Which trackers exist: entry points of the group `polyaccel.trackers`, ours too, and classes registered in this process."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from polyaccel.errors import TrackerError, nearest
from polyaccel.registry import tracker_entries
from polyaccel.tracking.tracker import GeneralTracker, check_contract

log = logging.getLogger("polyaccel.tracking")


class LoggerType(enum.StrEnum):
    """Accelerate's names of its trackers, for scripts that write `log_with=LoggerType.WANDB`."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"
    TRACKIO = "trackio"


_registered: dict[str, type[GeneralTracker]] = {}


def register_tracker_class(name: str, cls: type[Any]) -> None:
    """Make a tracker class known to this process as `log_with=name`. Raises TrackerError for one that breaks the contract."""
    check_contract(cls)
    _registered[name] = cls


def tracker_names() -> list[str]:
    """Names that `log_with` takes beside "all"."""
    return sorted({*tracker_entries(), *_registered})


def tracker_class(name: str) -> type[Any]:
    """The class of that name; loading it imports no vendor package. Raises TrackerError with the nearest name."""
    if name in _registered:
        return _registered[name]
    entry = tracker_entries().get(name)
    if entry is None:
        raise TrackerError(f"log_with={name!r} is no tracker", nearest(name, [*tracker_names(), "all"]))
    found: type[Any] = entry.load()
    check_contract(found)
    return found


def package_of(cls: type[Any]) -> str | None:
    """The vendor package that a tracker class needs and that is not installed; None where nothing is missing."""
    needed = getattr(cls, "package", None)
    return needed if needed is not None and find_spec(needed) is None else None


def choose(log_with: Any) -> list[type[Any] | Any]:
    """The tracker classes and instances that `log_with` asks for: a name, an enum of one, an instance, a list of these, or "all".

    Known trackers whose package is not installed are left out with a warning (without one for "all"). Raises TrackerError for
    unknown names and for instances that break the contract.
    """
    asked = [] if log_with is None else list(log_with) if isinstance(log_with, (list, tuple, set)) else [log_with]
    chosen: dict[str, Any] = {}
    for one in asked:
        name = one.value if isinstance(one, enum.Enum) else one
        if name == "all":
            chosen.update(
                {known: tracker_class(known) for known in tracker_names() if package_of(tracker_class(known)) is None}
            )
        elif isinstance(name, str):
            chosen.update(_if_installed(name))
        else:
            check_contract(one)
            chosen[one.name] = one
    return list(chosen.values())


def _if_installed(name: str) -> Iterable[tuple[str, Any]]:
    found = tracker_class(name)
    missing = package_of(found)
    if missing is None:
        return [(name, found)]
    log.warning(
        "log_with=%r: the package %s is not installed here (pip install %s); the run folder has everything, and"
        " `polyaccel runs replay` sends it later",
        name,
        missing,
        getattr(found, "requirement", missing),
    )
    return []
