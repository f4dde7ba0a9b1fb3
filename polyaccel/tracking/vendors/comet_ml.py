"""Comet. Options go to `comet_ml.start`."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.vendors.adapter import Adapter, numbers, texts


class CometMLTracker(Adapter):
    """With `online=False` an offline experiment, whose archive stands in the run folder."""

    name: ClassVar[str] = "comet_ml"
    package: ClassVar[str] = "comet_ml"
    requirement: ClassVar[str] = "comet_ml"

    def start(self) -> None:
        """`comet_ml.start`, which continues the experiment of a run that is continued."""
        import comet_ml

        options = dict(self.options)
        if "experiment_config" not in options:
            # The command line may hold secrets; run.json has it without them.
            offline = str(self.info.folder / "comet")
            options["experiment_config"] = comet_ml.ExperimentConfig(offline_directory=offline, parse_args=False)
        if "key" in self.info.previous and "experiment_key" not in options:
            options["experiment_key"] = self.info.previous["key"]
        options.setdefault("project_name", self.run_name)
        self._vendor = comet_ml.start(**options)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Parameters; Comet flattens them itself."""
        self._vendor.log_parameters(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers as metrics, texts as "other"."""
        self._vendor.log_metrics(numbers(values), step=step, **kwargs)
        for name, text in texts(values).items():
            self._vendor.log_other(name, text)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files."""
        for name, files in values.items():
            for file in files:
                self._vendor.log_image(file, name=name, step=step, **kwargs)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A CSV table."""
        self._vendor.log_table(f"{table_name}.csv", tabular_data=data, headers=columns or False, **kwargs)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file as an asset (offline too, where Comet refuses artifacts), or a `comet_ml.Artifact`."""
        if isinstance(artifact, str):
            self._vendor.log_asset(artifact, file_name=name, **kwargs)
        else:
            self._vendor.log_artifact(artifact, **kwargs)

    def finish(self) -> None:
        """Send or archive what is left."""
        self._vendor.end()

    def identity(self) -> dict[str, Any]:
        """Comet's key and address of the experiment."""
        return {"key": self._vendor.get_key(), "url": self._vendor.url}
