"""What a tracker is: Accelerate's `GeneralTracker`, and the run that it is told about before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

from polyaccel.errors import TrackerError


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that trackers take part in. `config` has its secrets hidden; `previous` is what `identity()` gave in the part of the run
    that is continued."""

    id: str
    project: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    is_resumed: bool = False
    previous: Mapping[str, Any] = field(default_factory=dict)
    is_main_process: bool = True


class GeneralTracker:
    """A destination of metrics. Subclass it, and give the instance to `log_with` or the class to `register_tracker_class`.

    A class needs `name`, `requires_logging_directory` and the property `tracker`. It is made as `Class(project_name, **init_kwargs)`, or
    `Class(project_name, logging_dir, **init_kwargs)` where it requires a logging directory. From then on every method is called
    on one thread that belongs to this tracker, never on the training thread; what a method raises is counted and never
    reaches the training loop.
    """

    name: ClassVar[str]
    requires_logging_directory: ClassVar[bool]
    main_process_only: bool = True  # False: every process starts it; all of them must call init_trackers then
    takes_files: ClassVar[bool] = False  # True: log_images gets paths of PNG files instead of what the script gave
    run: RunInfo | None = None  # set before start()

    @property
    def tracker(self) -> Any:
        """The vendor's own run object: what `get_tracker(name, unwrap=True)` gives."""
        raise NotImplementedError

    def start(self) -> None:
        """Connect, open files: everything that may take time."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Take the configuration, where init_trackers got one: nested dicts, lists and plain values."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Take numbers, texts, and objects of the vendor's own."""

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Take images by name."""
        raise CannotTake(self.name, "images")

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a table: `columns` and rows, or a dataframe."""
        raise CannotTake(self.name, "tables")

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take a file or folder by path, or an artifact object of the vendor's own."""
        raise CannotTake(self.name, "artifacts")

    def finish(self) -> None:
        """Send what is held, close."""

    def abandon(self) -> None:
        """`finish` did not come back in time and nobody waits for it any more: take away what would hold up the interpreter's exit."""

    def identity(self) -> dict[str, Any]:
        """What finds this run at the vendor again: kept in run.json, and given back in `run.previous` when the run is continued."""
        return {}


def on_main_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method of a tracker: it does nothing off the main process, unless the tracker's `main_process_only` is False.

    Trackers of polyaccel are only made where they are wanted; this is for classes that say so themselves, as Accelerate's do.
    """

    @wraps(method)
    def on_main(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = getattr(self, "run", None)
        is_wanted = run is None or run.is_main_process or not getattr(self, "main_process_only", True)
        return method(self, *args, **kwargs) if is_wanted else None

    return on_main


class CannotTake(TrackerError):
    """A tracker has no place for this kind of thing; it stays in the run folder."""

    def __init__(self, tracker: str, things: str) -> None:
        super().__init__(f"tracker {tracker!r} has no place for {things}", "they are kept in the run folder")
        self.things = things


CONTRACT = ("name", "requires_logging_directory", "tracker")


def check_contract(tracker: Any, parts: tuple[str, ...] = CONTRACT) -> None:
    """Raise TrackerError for a tracker, class or instance, that misses one of these parts of the contract."""
    kind = tracker if isinstance(tracker, type) else type(tracker)
    missing = [
        part for part in parts if not hasattr(kind, part) and not (tracker is not kind and hasattr(tracker, part))
    ]
    is_undefined = issubclass(kind, GeneralTracker) and kind.tracker is GeneralTracker.tracker
    if "tracker" in parts and is_undefined:
        missing.append("tracker")
    if missing:
        raise TrackerError(
            f"tracker class {kind.__qualname__} has no {', '.join(missing)}",
            "a tracker needs the attributes name and requires_logging_directory and the property tracker",
        )
