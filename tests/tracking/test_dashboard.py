"""`polyaccel runs ui`: without trackio an error with the way out, with it the runs in its dashboard."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from doubles import accelerator, run_of

from polyaccel.cli.main import main
from polyaccel.tracking import dashboard

HAS_TRACKIO = importlib.util.find_spec("trackio") is not None


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs of one project."""
    for name, first in (("one", 1.0), ("two", 2.0)):
        made = accelerator(tmp_path / "runs", run_id=name)
        made.init_trackers("looked at", config={"lr": 0.1})
        for step in range(5):
            made.log({"loss": first / (step + 1)}, step=step)
        made.end_training()
    return run_of(made).folder.parent.parent


def test_without_trackio_the_error_has_the_line_that_installs_it(runs, capsys, monkeypatch):
    monkeypatch.setattr(dashboard, "package_of", lambda kind: "trackio")
    assert main(["runs", "ui", "--folder", str(runs)]) == 1
    assert "pip install 'trackio>=0.30'" in capsys.readouterr().err


def test_no_runs_is_an_answer(tmp_path, capsys):
    assert main(["runs", "ui", "--folder", str(tmp_path)]) == 1
    assert "no runs below" in capsys.readouterr().out


def test_the_dashboards_process_sees_a_store_of_its_own_and_none_of_the_users_servers(runs, monkeypatch):
    started = {}

    class Started:
        def __init__(self, command, env):
            started.update(command=command, env=env)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def wait(self):
            return 0

    monkeypatch.setattr(dashboard, "package_of", lambda kind: None)
    monkeypatch.setattr(dashboard.subprocess, "Popen", Started)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:1")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/mine")
    assert main(["runs", "ui", "on", "--folder", str(runs), "--port", "7001", "--no-browser"]) == 0
    assert [name for name in started["env"] if name.startswith("TRACKIO_")] == ["TRACKIO_DIR"]
    assert started["env"]["TRACKIO_DIR"] == started["command"][-2]
    assert started["command"][-1].endswith("looked at/one") or started["command"][-1].endswith("one")
    assert not os.path.exists(started["env"]["TRACKIO_DIR"]), "nothing is left behind"


@pytest.mark.skipif(not HAS_TRACKIO, reason="trackio is not installed here")
def test_runs_are_served_with_their_steps_and_times(runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "polyaccel.cli.main", "runs", "ui", "--folder", str(runs)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--no-browser"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def ask(what, **parameters):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{what}",
            json.dumps(parameters).encode(),
            {"content-type": "application/json"},
        )
        return json.loads(urllib.request.urlopen(request, timeout=5).read())["data"]

    try:
        end = time.monotonic() + 60
        while True:
            try:
                (project,) = ask("get_all_projects")
                break
            except OSError:
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.2)
        logs = ask("get_logs", project=project, run="two")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert [(log["step"], log["loss"]) for log in logs] == [(step, 2.0 / (step + 1)) for step in range(5)]
    from polyaccel.tracking import find_run

    logged = [entry.time for entry in find_run("two", runs).metrics()]
    from datetime import datetime

    assert [datetime.fromisoformat(log["timestamp"]).timestamp() for log in logs] == pytest.approx(logged, abs=1e-3)
    assert "two: 5 log calls" in output
