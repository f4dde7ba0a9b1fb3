"""DVCLive: TSV and JSON files, versioned by DVC where the project is a DVC repository. Options go to `dvclive.Live`."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.tracker import CannotTake
from polyaccel.tracking.vendors.adapter import Adapter, numbers


class DVCLiveTracker(Adapter):
    """Files stand in the run folder unless `dir` names another place; `live` is an own `Live` to use instead."""

    name: ClassVar[str] = "dvclive"
    package: ClassVar[str] = "dvclive"
    requirement: ClassVar[str] = "dvclive"

    def start(self) -> None:
        """`dvclive.Live`. It saves no DVC experiment and no dvc.yaml unless asked to, because both need a DVC repository."""
        import dvclive

        options = {"dir": str(self.info.folder / "dvclive"), "resume": self.info.is_resumed}
        own = self.options.pop("live", None)
        made = {**options, "save_dvc_exp": False, "dvcyaml": None, **self.options}
        self._vendor = own if own is not None else dvclive.Live(**made)
        self._step: int | None = None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Parameters, nested as they are."""
        self._vendor.log_params(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers; DVCLive writes a step's summary when the next step begins."""
        if step is not None:
            self._go_to(step)
        for name, number in numbers(values).items():
            self._vendor.log_metric(name, number, **kwargs)
        if step is None:
            self._vendor.next_step()

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files."""
        if step is not None:
            self._go_to(step)
        for name, files in values.items():
            for index, file in enumerate(files):
                plain = name.replace("/", "_")
                self._vendor.log_image(f"{plain}.png" if len(files) == 1 else f"{plain}-{index}.png", file)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file or folder of a DVC repository."""
        if self._vendor._dvc_repo is None:
            raise CannotTake(self.name, "artifacts outside a DVC repository")
        self._vendor.log_artifact(artifact, name=name, **kwargs)

    def finish(self) -> None:
        """Write the summary."""
        self._vendor.end()

    def _go_to(self, step: int) -> None:
        if self._step is not None and step != self._step:
            self._vendor.make_summary()
        self._step = self._vendor.step = step
