"""Where a project keeps its files: the folder of checkpoints, the folder of runs, and which run this is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from polyaccel.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(slots=True)
class ProjectConfiguration:
    """Accelerate's project settings, and those of its run.

    Args:
        project_dir: folder of the project: checkpoints, and runs where `logging_dir` does not name another place.
        logging_dir: folder of the runs; None: `project_dir`.
        automatic_checkpoint_naming: `save_state` writes `project_dir/checkpoints/checkpoint_<iteration>`.
        total_limit: how many automatically named checkpoints are kept; None: all.
        iteration: number of the next automatically named checkpoint.
        save_on_each_node: write checkpoints on every host instead of on one shared file system.
        run_id: name of the run's folder. A run of that name is continued, otherwise it is started; None: a new run.
        tracker_init_timeout_s: how long a tracker may take to start before it is said that it does not answer.
        tracker_finish_timeout_s: how long `end_training` waits for trackers to send what they hold, all together.
    """

    project_dir: str | PathLike[str] | None = None
    logging_dir: str | PathLike[str] | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False
    run_id: str | None = None
    tracker_init_timeout_s: float = 30.0
    tracker_finish_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Check what can be checked before anything is written. Raises ConfigError."""
        if self.logging_dir is None:
            self.logging_dir = self.project_dir
        if self.run_id is not None and not _RUN_ID.fullmatch(self.run_id):
            raise ConfigError(
                f"run_id={self.run_id!r} cannot name a folder",
                "use letters, digits, '-', '_' and '.', at most 128, starting with a letter or digit",
            )
        for name in ("tracker_init_timeout_s", "tracker_finish_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is no time to wait", "give seconds above 0")

    @classmethod
    def of(cls, given: ProjectConfiguration | None, project_dir: str | PathLike[str] | None) -> ProjectConfiguration:
        """What `Accelerator(project_config=..., project_dir=...)` mean together. Raises ConfigError where they contradict each other."""
        if given is None:
            return cls(project_dir)
        if project_dir is not None and given.project_dir is None:
            given.set_directories(project_dir)
        elif project_dir is not None and Path(project_dir) != Path(given.project_dir or ""):
            raise ConfigError(
                f"project_dir={str(project_dir)!r} contradicts project_config, whose project_dir is {str(given.project_dir)!r}",
                "give one of the two",
            )
        return given

    def set_directories(self, project_dir: str | PathLike[str] | None = None) -> None:
        """Move the project; the runs move with it where they have no place of their own."""
        follows = self.logging_dir == self.project_dir
        self.project_dir = project_dir
        if follows or self.logging_dir is None:
            self.logging_dir = project_dir

    @property
    def runs_dir(self) -> Path:
        """Folder of the runs: `logging_dir`; inside a project that gives no other place `project_dir/runs`; else `runs`."""
        if self.logging_dir is not None and self.logging_dir != self.project_dir:
            return Path(self.logging_dir)
        return Path(self.project_dir, "runs") if self.project_dir is not None else Path("runs")
