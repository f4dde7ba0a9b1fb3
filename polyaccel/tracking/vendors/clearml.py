"""ClearML. Options go to `Task.init`; `offline=True` writes a task that `Task.import_offline_session` sends later."""

from __future__ import annotations

from typing import Any, ClassVar

from polyaccel.tracking.vendors.adapter import Adapter, numbers, texts


class ClearMLTracker(Adapter):
    """A task named after the run folder, in the project. ClearML's own hooks into frameworks and streams are off unless asked for."""

    name: ClassVar[str] = "clearml"
    package: ClassVar[str] = "clearml"
    requirement: ClassVar[str] = "clearml"

    def start(self) -> None:
        """`Task.init`, which continues the task of a run that is continued."""
        from clearml import Task

        options = dict(self.options)
        if options.pop("offline", False):
            Task.set_offline(True)
        options.setdefault("project_name", self.run_name)
        options.setdefault("task_name", self.info.id)
        options.setdefault("reuse_last_task_id", False)
        options.setdefault("continue_last_task", self.info.previous.get("id", False))
        for hook in ("arg_parser", "frameworks", "streams"):
            options.setdefault(f"auto_connect_{hook}", False)
        options.setdefault("auto_resource_monitoring", False)
        self._vendor = Task.init(**options)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Hyperparameters; ClearML joins nested names by "/"."""
        self._vendor.connect(values, name="config", ignore_remote_overrides=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """A number `train/loss` is series `loss` of the plot `train`, as in Accelerate (`train_loss`: plot `loss`, series `train`)."""
        logger = self._vendor.get_logger()
        for name, number in numbers(values).items():
            title, series = _title(name)
            if step is None:
                logger.report_single_value(name, number)
            else:
                logger.report_scalar(title, series, number, step)
        for name, text in texts(values).items():
            logger.report_text(f"{name}: {text}", print_console=False)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images from files."""
        for name, files in values.items():
            for index, file in enumerate(files):
                self._vendor.get_logger().report_image(name, str(index), iteration=step, local_path=file, **kwargs)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A table plot; its first row is the columns."""
        rows = [columns or [], *(data or [])]
        self._vendor.get_logger().report_table(table_name, "table", iteration=step or 0, table_plot=rows, **kwargs)

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file or folder."""
        self._vendor.upload_artifact(name or str(artifact), artifact, wait_on_upload=True, **kwargs)

    def finish(self) -> None:
        """Send what is left."""
        self._vendor.close()

    def identity(self) -> dict[str, Any]:
        """ClearML's id of the task."""
        return {"id": self._vendor.id}


def _title(name: str) -> tuple[str, str]:
    for prefix in ("eval", "test", "train"):
        if name.startswith(prefix + "_"):
            return name.removeprefix(prefix + "_"), prefix
    title, _, series = name.rpartition("/")
    return (title, series) if title else (name, "train")
