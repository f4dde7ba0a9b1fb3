"""Aim. Options go to `aim.Run`; `repo` is the repository, by default in the folder of the runs."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.tracker import CannotTake
from polyaccel.tracking.vendors.adapter import Adapter, numbers, texts


class AimTracker(Adapter):
    """The experiment is the project; the run is named after the run folder."""

    name: ClassVar[str] = "aim"
    package: ClassVar[str] = "aim"
    requirement: ClassVar[str] = "aim"

    def start(self) -> None:
        """`aim.Run`, without Aim's capture of the terminal and of system values unless asked for."""
        import aim

        runs = self.info.folder.parent.parent
        options = {"repo": str(runs), "system_tracking_interval": None, "capture_terminal_logs": False}
        if "hash" in self.info.previous:
            options["run_hash"] = self.info.previous["hash"]
        self._vendor = aim.Run(**{**options, "experiment": self.run_name, **self.options})
        self._vendor.name = self.info.id

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The configuration as run["hparams"], nested."""
        self._vendor["hparams"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers and texts, tracked by name."""
        import aim

        for name, number in numbers(values).items():
            self._vendor.track(number, name=name, step=step, **kwargs)
        for name, text in texts(values).items():
            self._vendor.track(aim.Text(text), name=name, step=step, **kwargs)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files; options go to `aim.Image`."""
        import aim

        for name, files in values.items():
            self._vendor.track([aim.Image(file, **kwargs) for file in files], name=name, step=step)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file or folder, where the repository has a place for artifacts (`run.set_artifacts_uri`)."""
        if self._vendor.artifacts_uri is None:
            raise CannotTake(self.name, "artifacts before `run.set_artifacts_uri`")
        self._vendor.log_artifact(artifact, name=name, **kwargs)

    def finish(self) -> None:
        """Close the run."""
        self._vendor.close()

    def abandon(self) -> None:
        """Aim's exit handler waits for the server without an end, and would keep the finished script from exiting."""
        import atexit

        from aim.ext.cleanup import AutoClean

        atexit.unregister(AutoClean.cleanup)
        AutoClean.stop_signal.set()

    def identity(self) -> dict[str, Any]:
        """Aim's own hash of the run."""
        return {"hash": self._vendor.hash}
