"""Metrics of a run: an own run folder that is always written, and vendors' trackers on threads of their own."""

from polyaccel.tracking.names import register_tracker_class, tracker_names
from polyaccel.tracking.observer import Observer
from polyaccel.tracking.replay import replay
from polyaccel.tracking.runs import Entry, Run, find_run, list_runs
from polyaccel.tracking.session import Session
from polyaccel.tracking.surroundings import describe_job, package_versions
from polyaccel.tracking.tracker import GeneralTracker, RunInfo

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
    "list_runs",
    "register_tracker_class",
    "replay",
    "tracker_names",
]
