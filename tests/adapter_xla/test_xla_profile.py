"""Profiles on torch_xla: the graphs of a step are in the trace, and choices that its recorder lacks are refused."""

import gzip
import json

import pytest
import torch

from polyaccel import Accelerator
from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import UnsupportedError


def test_a_trace_has_the_graphs_that_ran(tmp_path):
    accelerator = Accelerator(backend="xla", cpu=True)
    model = torch.nn.Linear(8, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = accelerator.train_step(lambda model, x: model(x).square().mean(), model, optimizer)
    batch = torch.ones(4, 8).to(accelerator.device)
    step(batch)
    with accelerator.profile(ProfileKwargs(output_trace_dir=tmp_path)) as profile:
        step(batch)
    (file,) = [file for file in profile.files if file.name.endswith(".trace.json.gz")]
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"ProfilerStep 0", "SyncTensorsGraph"} <= names
    copied = json.loads((tmp_path / "profile_0.json").read_text())
    assert {event.get("name") for event in copied["traceEvents"]} == names


@pytest.mark.parametrize("setting", [{"with_stack": True}, {"profile_memory": True}, {"activities": ["cpu"]}])
def test_what_the_recorder_cannot_be_told_is_refused_by_name(setting):
    with pytest.raises(UnsupportedError, match=next(iter(setting))):
        Accelerator(backend="xla", cpu=True).profile(ProfileKwargs(**setting))
