"""MLflow, through its client and without its global run. Calls wait for the server, on this tracker's thread: MLflow's own asynchronous
mode hangs the exit of the interpreter when the server is gone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from polyaccel.tracking.values import flatten
from polyaccel.tracking.vendors.adapter import Adapter, numbers

_PARAMS_PER_BATCH = 100  # MLflow's own limits
_LONGEST_PARAM = 6000


class MLflowTracker(Adapter):
    """Options: `tracking_uri` (default: MLflow's own choice, MLFLOW_TRACKING_URI), `experiment_name`, `run_id`, `run_name`, `tags`,
    `description`, `http_timeout_s` and `http_retries` of one request."""

    name: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow"
    requirement: ClassVar[str] = "mlflow"

    def __init__(
        self,
        experiment_name: str,
        *,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
        tags: dict[str, Any] | None = None,
        description: str | None = None,
        http_timeout_s: int = 10,
        http_retries: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(options.pop("experiment_name", experiment_name), **options)
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._name = run_name
        self._tags = {**(tags or {}), **({"mlflow.note.content": description} if description else {})}
        self._http = (http_timeout_s, http_retries)
        self._id = ""

    def start(self) -> None:
        """Find or make the experiment, then continue the run or make one."""
        from mlflow import MlflowClient
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

        MLFLOW_HTTP_REQUEST_TIMEOUT.set(self._http[0])
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(self._http[1])
        client = MlflowClient(tracking_uri=self._tracking_uri)
        known = self._run_id or self.info.previous.get("run_id")
        if known:
            client.update_run(known, status="RUNNING")
            self._id = known
        else:
            experiment = client.get_experiment_by_name(self.run_name)
            number = experiment.experiment_id if experiment is not None else client.create_experiment(self.run_name)
            tags = {**self._tags, "polyaccel.run_id": self.info.id}
            self._id = client.create_run(number, run_name=self._name or self.info.id, tags=tags).info.run_id
        self._client = client
        self._vendor = client.get_run(self._id)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Flat parameters, names joined by "."; a value that is too long for MLflow is cut there."""
        from mlflow.entities import Param

        known = self._vendor.data.params if self.info.is_resumed else {}  # MLflow refuses to change a parameter
        params = [
            Param(name, str(value)[:_LONGEST_PARAM]) for name, value in flatten(values).items() if name not in known
        ]
        for first in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self._id, params=params[first : first + _PARAMS_PER_BATCH])

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """All numbers of one call in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step or 0) for name, value in numbers(values).items()]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Artifacts below images/."""
        for files in values.values():
            for file in files:
                self._client.log_artifact(self._id, file, "images")

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A JSON table artifact; a later table of the same name is appended by MLflow."""
        by_column = {name: [row[index] for row in data or []] for index, name in enumerate(columns or [])}
        self._client.log_table(self._id, by_column, f"{table_name}.json")

    def log_artifact(self, artifact: Any, name: str | None = None, **kwargs: Any) -> None:
        """A file or folder."""
        if Path(artifact).is_dir():
            self._client.log_artifacts(self._id, artifact, kwargs.get("artifact_path"))
        else:
            self._client.log_artifact(self._id, artifact, kwargs.get("artifact_path"))

    def finish(self) -> None:
        """The run is over."""
        self._client.set_terminated(self._id)

    def identity(self) -> dict[str, Any]:
        """MLflow's own id of the run, which it makes itself."""
        return {"run_id": self._id, "experiment_id": self._vendor.info.experiment_id}
