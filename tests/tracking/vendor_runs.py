"""Logs one run to one vendor without a network, and reads it back with the vendor's own reader: `vendor_runs.py NAME FOLDER [replay]`.

A process of its own per vendor, because several of them keep state in their modules, hook into the interpreter or start services.
Prints one JSON object.
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from doubles import accelerator

from polyaccel.tracking import replay

STEPS = 20
CONFIG = {"lr": 0.01, "model": {"dim": 4, "layers": [1, 2]}, "name": "small", "flag": True}
NAME, FOLDER = sys.argv[1], Path(sys.argv[2])


def options():
    """init_kwargs that keep the vendor on this machine."""
    return {
        "wandb": {"mode": "offline"},
        "mlflow": {"tracking_uri": f"sqlite:///{FOLDER}/mlflow.db"},
        "comet_ml": {"online": False},
        "clearml": {"offline": True},
        "swanlab": {"mode": "offline"},
    }.get(NAME, {})


def write():
    """Twenty steps, configuration, image, table, artifact."""
    one = accelerator(FOLDER / "logs", *([] if sys.argv[3:] else [NAME]))
    one.init_trackers("vendor-test", config=CONFIG, init_kwargs={} if sys.argv[3:] else {NAME: options()})
    for step in range(STEPS):
        one.log({"loss": np.float32(1 / (step + 1)), "train/acc": step / 10}, step=step)
    one.log({"note": "a text"}, step=STEPS)
    one.log_images({"picture": np.zeros((4, 5, 3), np.uint8)}, step=STEPS)
    one.log_table("scores", columns=["who", "score"], data=[["a", 1.5], ["b", 2.5]], step=STEPS)
    (FOLDER / "weights.txt").write_text("abc")
    one.log_artifact(FOLDER / "weights.txt")
    begin = time.monotonic()
    one.end_training()
    facts = json.loads((one.tracking.folder / "run.json").read_text())
    report = {"finish_s": time.monotonic() - begin, "calls": facts["calls"].get(NAME), "id": facts["id"]}
    if sys.argv[3:]:
        sent = replay(one.tracking.folder, NAME, **options())
        report["replayed"] = [sent.num_metrics, sent.num_images, sent.num_tables, sent.num_artifacts]
    return one.tracking.folder, facts["trackers"].get(NAME, {}), report


def read_tensorboard(folder, identity):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    return {
        "losses": {event.step: event.value for event in events.Scalars("loss")},
        "images": len(tags["images"]),
        "config": json.loads(events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()[8:-4]),
        "hparams": "_hparams_/session_start_info" in json.dumps(sorted(events.summary_metadata)),
        "text": events.Tensors("note/text_summary")[0].tensor_proto.string_val[0].decode(),
        "table": "| b | 2.5 |" in events.Tensors("scores/text_summary")[0].tensor_proto.string_val[0].decode(),
    }


def read_wandb(folder, identity):
    import wandb_log

    found = wandb_log.read(folder)
    images = [row["picture/filenames"] for row in found["rows"] if "picture/filenames" in row]
    return {
        "losses": {row["_step"]: row["loss"] for row in found["rows"] if "loss" in row},
        "config": {name: found["config"].get(name) for name in CONFIG},
        "images": len(images[0]),
        "text": next(row["note"] for row in found["rows"] if "note" in row),
        "table": any(row.get("scores/nrows") == 2 for row in found["rows"]),
        "artifacts": [name for name in found["artifacts"] if name == "weights.txt"],
        "id": found["id"],
    }


def read_trackio(folder, identity):
    from trackio.sqlite_storage import SQLiteStorage

    run_name = folder.name
    rows = SQLiteStorage.get_logs("vendor-test", run_name)
    kept = SQLiteStorage.get_run_config("vendor-test", run_name) or {}
    return {
        "losses": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "config": {name: kept.get(name) for name in CONFIG},
        "images": sum("picture" in row for row in rows),
        "text": next(row["note"] for row in rows if "note" in row),
        "table": any("scores" in row for row in rows),
    }


def read_mlflow(folder, identity):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{FOLDER}/mlflow.db")
    experiment = client.get_experiment_by_name("vendor-test")
    (run,) = client.search_runs([experiment.experiment_id])
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    return {
        "losses": {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")},
        "params": run.data.params,
        "images": len(client.list_artifacts(run.info.run_id, "images")),
        "table": "scores.json" in files,
        "artifacts": [name for name in files if name == "weights.txt"],
        "status": run.info.status,
    }


def read_comet_ml(folder, identity):
    (archive,) = folder.rglob("*.zip")
    with zipfile.ZipFile(archive) as content:
        messages = [json.loads(line) for line in content.read("messages.json").decode().splitlines()]
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    parameters = [m["payload"].get("param") or m["payload"]["params"] for m in messages if m["type"] == "parameter_msg"]
    files = [m["payload"]["additional_params"] for m in messages if m["type"] == "file_upload"]
    named = [file.get("fileName") or file.get("figName") for file in files]
    return {
        "losses": {m["step"]: m["metricValue"] for m in metrics if m["metricName"] == "loss"},
        "config": {p["paramName"]: p["paramValue"] for p in parameters if p["source"] == "manual"},
        "images": named.count("picture"),
        "table": "scores.csv" in named,
        "artifacts": [name for name in named if name == "weights.txt"],
        "arguments": [p["paramName"] for p in parameters if p["source"] == "cli"],
    }


def read_aim(folder, identity):
    import aim
    from aim.storage.context import Context

    # A repository that was written without its server shows a run completely only after this.
    command = [str(Path(sys.executable).parent / "aim"), "storage", "--repo", str(FOLDER / "logs"), "reindex", "-y"]
    subprocess.run(command, check=True, capture_output=True)
    repo = aim.Repo(str(FOLDER / "logs"))
    run = repo.get_run(identity["hash"])
    steps, (values, *_) = next(metric for metric in run.metrics() if metric.name == "loss").data.items_list()
    images = list(run.get_image_sequence("picture", Context({})).values)
    return {
        "losses": dict(zip(map(int, steps), map(float, values), strict=True)),
        "config": run["hparams"],
        "images": len(images),
        "name": run.name,
    }


def read_clearml(folder, identity):
    from clearml import Task

    folders = [p for p in Path.home().rglob("metrics.jsonl") if identity["id"] in str(p)]
    archives = [p for p in Path.home().rglob("*.zip") if identity["id"] in str(p)]
    if archives:
        with zipfile.ZipFile(archives[0]) as content:
            lines = content.read("metrics.jsonl").decode().splitlines()
    else:
        lines = folders[0].read_text().splitlines()
    events = [event for line in lines for event in json.loads(line)]
    return {
        "losses": {e["iter"]: e["value"] for e in events if e.get("metric") == "loss" and "value" in e},
        "offline": Task.is_offline(),
        "table": any(e.get("metric") == "scores" for e in events),
        "images": sum(e.get("metric") == "picture" for e in events),
    }


def read_dvclive(folder, identity):

    rows = (folder / "dvclive/plots/metrics/loss.tsv").read_text().splitlines()
    header, *lines = [row.split("\t") for row in rows]
    at = {name: index for index, name in enumerate(header)}
    import yaml

    return {
        "losses": {int(line[at["step"]]): float(line[at["loss"]]) for line in lines},
        "config": yaml.safe_load((folder / "dvclive/params.yaml").read_text()),
        "images": len(list((folder / "dvclive/plots/images").rglob("*.png"))),
        "artifacts": [file.name for file in (folder / "dvclive").rglob("weights.txt")],
    }


def read_swanlab(folder, identity):
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = (folder / "swanlab").rglob("*.swanlab")
    (config,) = (folder / "swanlab").rglob("config.yaml")
    reader = DataStoreReader()
    reader.open(file)
    records = []
    while (data := reader.scan()) is not None:
        record = Record()
        record.ParseFromString(data)
        records.append(record)
    scalars = [record.scalar for record in records if record.WhichOneof("record_type") == "scalar"]
    kept = yaml.safe_load(config.read_text())
    return {
        "losses": {scalar.step: scalar.value.number for scalar in scalars if scalar.key == "loss"},
        "config": {name: entry["value"] for name, entry in kept.items()},
        "images": len(list((folder / "swanlab").rglob("*.png"))),
        "artifacts": [path.name for path in (folder / "swanlab").rglob("weights.txt")],
    }


if __name__ == "__main__":
    os.environ["TRACKIO_DIR"] = str(FOLDER / "trackio")
    os.environ["HOME"] = str(FOLDER)  # what a vendor writes beside
    written, identity, report = write()
    found = globals()[f"read_{NAME}"](written, identity)
    print(json.dumps({**report, "found": found}))
