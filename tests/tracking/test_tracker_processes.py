"""A tracker with `main_process_only = False` on two real processes: each has its own calls, and the run folder has both."""

import json
import subprocess
from pathlib import Path

import pytest
from launching import launch_command

from polyaccel.registry import load_backend
from polyaccel.tracking import list_runs

ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("backend", ENGINES)
def test_every_process_logs_to_a_tracker_that_wants_it_and_the_first_alone_to_the_others(tmp_path, backend):
    done = subprocess.run(
        launch_command(backend, 2, Path(__file__).parent / "tracking_job.py", tmp_path),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert lines(tmp_path / f"everywhere-{rank}.jsonl") == [
            ["start"],
            ["config", {"lr": 0.1}],
            *(["log", {"rank": rank, "step": step, "first": float(step)}, step] for step in range(3)),
            ["images", ["picture"]],
            ["log", {"alone": float(rank)}, 4],
            ["finish"],
        ]
    first = lines(tmp_path / "first-0.jsonl")
    assert [call[1]["rank"] for call in first if call[0] == "log" and "rank" in call[1]] == [0, 0, 0]
    assert not (tmp_path / "first-1.jsonl").exists()
    (run,) = list_runs(tmp_path / "runs")
    assert run.series("rank") == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert run.status == "finished"
    others = [line for line in lines(run.folder / "metrics-1.jsonl") if "rank" in line["values"]]
    assert [(line["step"], line["values"]["rank"]) for line in others] == [(0, 1), (1, 1), (2, 1)]
    assert not (run.folder / "metrics-2.jsonl").exists()
