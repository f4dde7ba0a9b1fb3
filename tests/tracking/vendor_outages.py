"""Logs to a vendor whose server is gone, from the start or from the middle of the run on: `vendor_outages.py NAME FOLDER`.

Prints one JSON object: how long the calls on the training thread took, how long the end took, and what the run folder has.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from doubles import accelerator, run_of, until

NAME, FOLDER = sys.argv[1], Path(sys.argv[2])
STEPS = 400
INIT_S, FINISH_S = 3.0, 5.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nobody():
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def mlflow_server():
    port = free_port()
    store = f"sqlite:///{FOLDER}/server.db"
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [
            *command,
            "--workers",
            "1",
            "--backend-store-uri",
            store,
            "--default-artifact-root",
            str(FOLDER / "artifacts"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    address = f"http://127.0.0.1:{port}"

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/health", timeout=1).status == 200
        return False

    until(answers, 90)
    return server, {"tracking_uri": address, "http_timeout_s": 2, "http_retries": 0}


def aim_server():
    port = free_port()
    (FOLDER / "server").mkdir()
    aim = str(Path(sys.executable).parent / "aim")
    subprocess.run([aim, "init", "--repo", str(FOLDER / "server")], check=True, capture_output=True)
    server = subprocess.Popen(
        [aim, "server", "--repo", str(FOLDER / "server"), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    until(answers, 90)
    return server, {"repo": f"aim://127.0.0.1:{port}"}


def without_server():
    """(None, init_kwargs that lead to nobody)."""
    if NAME == "wandb":
        os.environ.update(WANDB_BASE_URL=nobody(), WANDB_API_KEY="0" * 40)
    elif NAME == "comet_ml":
        os.environ.update(COMET_URL_OVERRIDE=nobody() + "/clientlib/", COMET_API_KEY="x" * 25)
    elif NAME == "clearml":
        address = nobody()
        os.environ.update(
            CLEARML_API_HOST=address, CLEARML_WEB_HOST=address, CLEARML_FILES_HOST=address,
            CLEARML_API_ACCESS_KEY="x", CLEARML_API_SECRET_KEY="y",
        )  # fmt: skip
    elif NAME == "swanlab":
        os.environ.update(SWANLAB_API_HOST=nobody(), SWANLAB_API_KEY="x" * 21)
    return None, {}


def main():
    os.environ["HOME"] = str(FOLDER)
    os.environ["TRACKIO_DIR"] = str(FOLDER / "trackio")
    warnings = []

    class Collect(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    logging.getLogger("polyaccel.tracking").addHandler(Collect())
    server, options = {"mlflow": mlflow_server, "aim": aim_server}.get(NAME, without_server)()
    one = accelerator(FOLDER / "logs", NAME, tracker_init_timeout_s=INIT_S, tracker_finish_timeout_s=FINISH_S)
    begin = time.perf_counter()
    one.init_trackers("outage", config={"lr": 0.1}, init_kwargs={NAME: options})
    init_s = time.perf_counter() - begin
    if server is not None:
        until(lambda: one.tracking._workers[0].is_started.is_set(), 90)
    calls = []
    for step in range(STEPS):
        if step == STEPS // 2:
            if server is not None:
                until(lambda: one.tracking._workers[0].counts.sent >= 10, 60)
                os.killpg(server.pid, 9)
                server.wait()
            elif NAME in ("tensorboard", "trackio", "dvclive"):  # no server: their disk goes away
                until(lambda: one.tracking._workers[0].counts.sent >= STEPS // 2 - 1, 60)
                for gone in ("tensorboard", "dvclive"):
                    shutil.rmtree(one.tracking.folder / gone, ignore_errors=True)
                shutil.rmtree(FOLDER / "trackio", ignore_errors=True)
        begin = time.perf_counter()
        one.log({"loss": 1 / (step + 1)}, step=step)
        calls.append(time.perf_counter() - begin)
        time.sleep(0.005)
    if server is None and NAME not in ("tensorboard", "trackio", "dvclive"):
        until(lambda: warnings, 60)
    begin = time.perf_counter()
    one.end_training()
    calls.sort()
    run = run_of(one)
    report = {
        "init_s": init_s,
        "log_us_median": calls[len(calls) // 2] * 1e6,
        "log_us_max": calls[-1] * 1e6,
        "finish_s": time.perf_counter() - begin,
        "lines": len(list(run.metrics())),
        "status": run.status,
        "calls": run.facts["calls"][NAME],
        "warnings": warnings,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
