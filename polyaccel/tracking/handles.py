"""What user code holds of a tracker: calls of the contract go through the run's queue, everything else to the tracker itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyaccel.errors import TrackerError

if TYPE_CHECKING:
    from polyaccel.tracking.session import Session
    from polyaccel.tracking.worker import Worker


class TrackerHandle:
    """One tracker of a running Accelerator.

    `log`, `log_images`, `log_table` and `log_artifact` are queued for this tracker alone and return at once. Any other attribute
    is that of the tracker object itself (`handle.writer` of tensorboard, a method of your own class); it waits until the
    tracker has started, and what you call on it runs on your thread.
    """

    def __init__(self, session: Session, worker: Worker) -> None:
        self._session = session
        self._worker = worker
        self.name = worker.tracker_name

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """As `accelerator.log`, for this tracker alone; objects of the vendor's own are passed on."""
        self._session.log(values, step, {self.name: kwargs}, only=self.name)

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """As `accelerator.log_images`, for this tracker alone."""
        self._session.log_images(values, step, {self.name: kwargs}, only=self.name)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As `accelerator.log_table`, for this tracker alone."""
        self._session.log_table(table_name, columns, data, dataframe, step, {self.name: kwargs}, only=self.name)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """As `accelerator.log_artifact`, for this tracker alone; also takes an artifact object of the vendor's own."""
        self._session.log_artifact(artifact, name, {self.name: kwargs}, only=self.name)

    @property
    def tracker(self) -> Any:
        """The vendor's own run object; waits until the tracker has started."""
        return self._started().tracker

    def _started(self) -> Any:
        self._worker.is_settled.wait(self._session.init_timeout_s)
        if self._worker.tracker is None:
            raise TrackerError(
                f"tracker {self.name!r} has not started, so it has no object to give",
                "the log says why; training and the run folder do not need it",
            )
        return self._worker.tracker

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._started(), name)

    def __repr__(self) -> str:
        return f"TrackerHandle({self.name!r})"


class Absorber:
    """Stands for a tracker where there is none (off the main process): every attribute and call gives it again, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Absorber:
        return self

    def __enter__(self) -> Absorber:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())

    def __setitem__(self, key: Any, value: Any) -> None:
        """Absorbed: `run["name"] = value` of aim and neptune."""

    def __getitem__(self, key: Any) -> Absorber:
        return self

    def __repr__(self) -> str:
        return "Absorber()"
