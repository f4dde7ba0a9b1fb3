"""Profiles on torch are torch.profiler's, with its methods, its handlers and its files."""

import json
import subprocess
import sys

import pytest
import torch

from polyaccel import Accelerator
from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError
from polyaccel.tracking import list_runs


def profiled(settings, num_steps=4):
    accelerator = Accelerator(backend="torch", cpu=True)
    model = torch.nn.Linear(8, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.profile(settings) as profile:
        for _ in range(num_steps):
            accelerator.backward(model(torch.ones(2, 8)).sum())
            optimizer.step()
            profile.step()
    return profile


def events(file):
    return json.loads(file.read_text())["traceEvents"]


def test_a_trace_has_the_operations_with_shapes_and_the_table_can_be_asked_for(tmp_path):
    profile = profiled(ProfileKwargs(record_shapes=True, output_trace_dir=tmp_path))
    found = events(tmp_path / "process_0.0.pt.trace.json")
    products = [event for event in found if event.get("name") == "aten::addmm"]
    assert len(products) == 4
    assert products[0]["args"]["Input Dims"][1] == [2, 8]
    assert "aten::addmm" in profile.key_averages().table(sort_by="cpu_time_total", row_limit=20)
    assert events(tmp_path / "profile_0.json") == found


def test_torchs_own_tensorboard_handler_works_for_every_trace(tmp_path):
    handler = torch.profiler.tensorboard_trace_handler(str(tmp_path / "board"), worker_name="me")
    option = {"warmup": 1, "active": 1, "repeat": 2}
    profiled(ProfileKwargs(schedule_option=option, on_trace_ready=handler, output_trace_dir=tmp_path / "own"))
    written = sorted((tmp_path / "board").glob("me.*.pt.trace.json"))
    names = [{event.get("name") for event in events(file)} for file in written]
    assert ["ProfilerStep#1" in found for found in names] == [True, False]
    assert ["ProfilerStep#3" in found for found in names] == [False, True]


def test_memory_flops_and_stacks_are_recorded_when_asked_for(tmp_path):
    asked = {"profile_memory": True, "with_flops": True, "with_stack": True}
    profile = profiled(ProfileKwargs(**asked, output_trace_dir=tmp_path), num_steps=2)
    averages = {average.key: average for average in profile.key_averages()}
    assert averages["aten::addmm"].flops == 2 * 2 * 2 * 8 * 8
    assert any(event.get("name") == "[memory]" for event in events(profile.files[0]))
    assert any("test_torch_profile" in event.get("name", "") for event in events(profile.files[0]))


def test_an_activity_that_is_not_here_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedError, match="'tpu'"):
        profiled(ProfileKwargs(activities=["tpu"], output_trace_dir=tmp_path))
    assert profiled(ProfileKwargs(activities=["cpu"], output_trace_dir=tmp_path)).files


SCRIPT = """
import sys, torch
from polyaccel import Accelerator
accelerator = Accelerator(backend="torch", cpu=True, project_dir=sys.argv[1])
accelerator.init_trackers("two")
model = torch.nn.Linear(4, 4)
data = torch.utils.data.DataLoader(torch.ones(16, 4), batch_size=2)
model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
step = accelerator.train_step(lambda model, x: model(x).square().mean(), model, optimizer)
with accelerator.profile():
    for batch in accelerator.progress(data, description="train"):
        step(batch)
accelerator.end_training()
"""


def test_two_processes_show_one_bar_of_global_samples_and_write_a_trace_each_into_the_runs_folder(tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    command = ["launch", "--backend", "torch", "--num-processes", "2", "--cpu", "two.py", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "polyaccel.cli.main", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (run,) = list_runs(tmp_path / "runs")
    assert sorted(file.name for file in (run.folder / "profile").iterdir()) == [
        "process_0.0.pt.trace.json", "process_1.0.pt.trace.json",
    ]  # fmt: skip
    for file in (run.folder / "profile").iterdir():
        assert any(event.get("name") == "aten::addmm" for event in events(file))
    (noted,) = run.events("progress")
    assert noted["num_steps"] == 4
    assert noted["samples_per_s"] == pytest.approx(4 * noted["steps_per_s"])
    assert done.stderr.count("train: 4/4") == 1
