"""SwanLab. Options go to `swanlab.init`."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.vendors.adapter import Adapter


class SwanLabTracker(Adapter):
    """Named after the run folder; its local files stand there."""

    name: ClassVar[str] = "swanlab"
    package: ClassVar[str] = "swanlab"
    requirement: ClassVar[str] = "swanlab"

    def start(self) -> None:
        """`swanlab.init`."""
        import swanlab

        options: dict[str, Any] = {"log_dir": str(self.info.folder / "swanlab"), "name": self.info.id}
        if "id" in self.info.previous:
            options |= {"id": self.info.previous["id"], "resume": "allow"}
        self._vendor = swanlab.init(**{"project": self.run_name, **options, **self.options})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The configuration, nested as it is."""
        self._vendor.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers and SwanLab's own objects; a text becomes `swanlab.Text`."""
        import swanlab

        made = {name: swanlab.Text(value) if isinstance(value, str) else value for name, value in values.items()}
        self._vendor.log(made, step=step, **kwargs)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files; options go to `swanlab.Image`."""
        import swanlab

        images = {name: [swanlab.Image(file, **kwargs) for file in files] for name, files in values.items()}
        self._vendor.log(images, step=step)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file, copied into the run."""
        import swanlab

        swanlab.save(artifact, **kwargs)

    def finish(self) -> None:
        """Write or send what is left."""
        self._vendor.finish()

    def identity(self) -> dict[str, Any]:
        """SwanLab's id of the run."""
        return {"id": self._vendor.id}
