"""Runs and trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyaccel.facade.parts import Parts


class Tracking(Parts):
    """What is logged, and where."""

    def init_trackers(
        self, project_name: str, config: Any = None, init_kwargs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Start a run: its folder `<runs>/<project>/<run id>`, and every tracker of `log_with` on a thread of its own.

        Args:
            project_name: W&B's project, MLflow's experiment, the folder of the run.
            config: a dict (nested if you like), argparse.Namespace or dataclass; values that are secret by name are hidden.
            init_kwargs: options of the vendors' own init functions: {"wandb": {"entity": "my-team"}}.

        Returns at once. A tracker that fails or does not answer is named in the log and never stops training. May be called on
        the main process alone, unless a tracker wants every process. Raises TrackerError for options of an unknown tracker.
        """
        self.tracking.start(project_name, config, init_kwargs or {})

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log numbers and texts to the run folder and to every tracker; on the main process, nothing elsewhere.

        Values on a device are fetched in the background: the call takes microseconds and waits for nothing. `log_kwargs` are
        options of the vendors' own log functions, by tracker.
        """
        self.tracking.log(values, step, log_kwargs or {})

    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log images by name: arrays (height, width[, channels]) or (channels, height, width), PIL images, PNG files, or lists."""
        self.tracking.log_images(values, step, log_kwargs or {})

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log a table of `columns` and rows, or a dataframe."""
        self.tracking.log_table(table_name, columns, data, dataframe, step, log_kwargs or {})

    def log_artifact(
        self, artifact: Any, name: str | None = None, log_kwargs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Log a file or folder by its path. Small files are copied into the run folder before the call returns."""
        self.tracking.log_artifact(artifact, name, log_kwargs or {})

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The tracker of that name, or with `unwrap` the vendor's own run object. Off the main process, what absorbs every call.

        Raises TrackerError on the main process where no such tracker was started.
        """
        return self.tracking.get(name, unwrap)

    @property
    def trackers(self) -> list[Any]:
        """The started trackers, in the order of `log_with`."""
        return list(self.tracking.trackers)

    @property
    def project_dir(self) -> Any:
        """Folder of the project."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> Any:
        """Folder of the runs, where it is not that of the project."""
        return self.project_configuration.logging_dir
