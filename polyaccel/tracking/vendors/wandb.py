"""Weights & Biases. Options go to `wandb.init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from polyaccel.tracking.vendors.adapter import Adapter


class WandBTracker(Adapter):
    """The run has the id of the run folder; a run that is continued continues at W&B too."""

    name: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"
    requirement: ClassVar[str] = "wandb"

    def start(self) -> None:
        """`wandb.init(project=...)`; its files go to the run folder unless `dir` names another place."""
        import wandb

        options = {"project": self.run_name, "id": self.info.id, "name": self.info.id, "dir": str(self.info.folder)}
        if self.info.is_resumed:
            options["resume"] = "allow"
        self._vendor = wandb.init(**{**options, **self.options})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The configuration as it is nested."""
        self._vendor.config.update(values, allow_val_change=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers, texts and W&B's own objects."""
        self._vendor.log(values, step=step, **kwargs)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files; options go to `wandb.Image`."""
        import wandb

        images = {name: [wandb.Image(file, **kwargs) for file in files] for name, files in values.items()}
        self._vendor.log(images, step=step)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A `wandb.Table`."""
        import wandb

        table = wandb.Table(columns=columns, data=data, dataframe=dataframe, allow_mixed_types=True)
        self._vendor.log({table_name: table}, step=step, **kwargs)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A `wandb.Artifact`, or a file or folder, which becomes one of type "file"."""
        if isinstance(artifact, str):
            import wandb

            path = Path(artifact)
            made = wandb.Artifact(_artifact_name(name or path.name), type=kwargs.pop("type", "file"))
            if path.is_dir():
                made.add_dir(artifact)
            else:
                made.add_file(artifact, name=name or path.name)
            artifact = made
        self._vendor.log_artifact(artifact, **kwargs)

    def finish(self) -> None:
        """Send what is left."""
        self._vendor.finish()

    def identity(self) -> dict[str, Any]:
        """W&B's id and address of the run."""
        return {"id": self._vendor.id, "url": self._vendor.url}


def _artifact_name(name: str) -> str:
    """W&B allows letters, digits, '-', '_' and '.' in an artifact's name."""
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
