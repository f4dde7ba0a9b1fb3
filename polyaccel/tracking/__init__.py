"""Metrics of a run: an own run folder that is always written, and vendors' trackers on threads of their own.

Accelerate's names of the vendors' classes (`WandBTracker`, ...) and of their table (`LOGGER_TYPE_TO_CLASS`) are loaded when first used.
"""

from importlib import import_module
from typing import Any

from polyaccel.tracking.names import installed_trackers, register_tracker_class, tracker_names
from polyaccel.tracking.observer import Observer
from polyaccel.tracking.replay import replay
from polyaccel.tracking.runs import Entry, Run, find_run, list_runs
from polyaccel.tracking.session import Session
from polyaccel.tracking.surroundings import describe_job, package_versions
from polyaccel.tracking.tracker import GeneralTracker, RunInfo, on_main_process

_VENDORS = {
    "AimTracker": "aim",
    "ClearMLTracker": "clearml",
    "CometMLTracker": "comet_ml",
    "DVCLiveTracker": "dvclive",
    "MLflowTracker": "mlflow",
    "SwanLabTracker": "swanlab",
    "TensorBoardTracker": "tensorboard",
    "TrackioTracker": "trackio",
    "WandBTracker": "wandb",
}

__all__ = [
    "Entry",
    "GeneralTracker",
    "Observer",
    "Run",
    "RunInfo",
    "Session",
    "describe_job",
    "package_versions",
    "find_run",
    "get_available_trackers",
    "list_runs",
    "on_main_process",
    "register_tracker_class",
    "replay",
    "tracker_names",
]

get_available_trackers = installed_trackers  # Accelerate's name


def __getattr__(name: str) -> Any:
    if name == "LOGGER_TYPE_TO_CLASS":
        return import_module("polyaccel.tracking.names").all_tracker_classes()
    if name not in _VENDORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"polyaccel.tracking.vendors.{_VENDORS[name]}"), name)
