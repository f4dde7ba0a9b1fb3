"""Which trackers exist: entry points of the group `polyaccel.trackers`, ours too, and classes registered in this process."""

from __future__ import annotations

import enum
import logging
import warnings
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


_registered: dict[str, type[Any]] = {}


def register_tracker_class(tracker_class: type[Any]) -> None:
    """Make a tracker class known to this process as `log_with=tracker_class.name`, in place of one that had this name before.

    Raises TrackerError for anything but a subclass of GeneralTracker with a `name` and `requires_logging_directory`.
    """
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)):
        raise TrackerError(
            f"{tracker_class!r} is no subclass of GeneralTracker",
            "register a class; an instance goes to Accelerator(log_with=...) itself",
        )
    check_contract(tracker_class, parts=("name", "requires_logging_directory"))
    name = tracker_class.name
    if name in tracker_names() and _registered.get(name) is not tracker_class:
        warnings.warn(f"{tracker_class.__qualname__} takes the place of the tracker named {name!r}", stacklevel=2)
    _registered[name] = tracker_class


def all_tracker_classes() -> dict[str, type[Any]]:
    """The table of tracker classes by name, with those that are installed filled in; what is put into it is registered."""
    for name in tracker_entries():
        _registered.setdefault(name, tracker_class(name))
    return _registered


def installed_trackers() -> list[str]:
    """The known trackers whose vendor package is here: what "all" stands for."""
    return [name for name in tracker_names() if package_of(tracker_class(name)) is None]


def tracker_names() -> list[str]:
    """Names that `log_with` takes beside "all"."""
    return sorted({*tracker_entries(), *_registered})


def tracker_class(name: str) -> type[Any]:
    """The class of that name; loading it imports no vendor package. Raises TrackerError with the nearest name."""
    found = _registered.get(name)
    if found is None:
        entry = tracker_entries().get(name)
        if entry is None:
            raise TrackerError(f"log_with={name!r} is no tracker", nearest(name, [*tracker_names(), "all"]))
        found = entry.load()
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
            chosen.update({known: tracker_class(known) for known in installed_trackers()})
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
