"""trackio, Hugging Face's local-first tracker. Options go to `trackio.init`."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.vendors.adapter import Adapter


class TrackioTracker(Adapter):
    """One SQLite file per project; the run is named after the run folder."""

    name: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"
    requirement: ClassVar[str] = "trackio"

    def start(self) -> None:
        """`trackio.init`, which takes the configuration at once."""
        import trackio

        options = {
            "name": self.info.id,
            "config": dict(self.info.config),
            "resume": "allow" if self.info.is_resumed else "never",
            "embed": False,
        }
        self._vendor = trackio.init(self.run_name, **{**options, **self.options})

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers, texts and trackio's own objects."""
        self._vendor.log(values, step=step, **kwargs)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files; several of one name are numbered, as trackio takes one image per name."""
        import trackio

        for name, files in values.items():
            numbered = len(files) > 1
            images = {f"{name}/{index}" if numbered else name: trackio.Image(file) for index, file in enumerate(files)}
            self._vendor.log({**images, **kwargs}, step=step)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A `trackio.Table`."""
        import trackio

        self._vendor.log({table_name: trackio.Table(columns=columns, data=data, dataframe=dataframe)}, step=step)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file, folder or `trackio.Artifact`."""
        self._vendor.log_artifact(artifact, name=name, **kwargs)

    def finish(self) -> None:
        """Write what is left."""
        import trackio

        trackio.finish()

    def identity(self) -> dict[str, Any]:
        """The project and name of the run."""
        return {"project": self.run_name, "name": self._vendor.name}
