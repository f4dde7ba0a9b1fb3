"""On real CUDA devices: traces have kernels, bars know memory and peak, and a fence waits for the device."""

import gzip
import json

import pytest
import torch

from polyaccel import Accelerator
from polyaccel.config.profile import ProfileKwargs
from polyaccel.looking.devices import peak_of
from polyaccel.looking.meter import settle


def prepared(backend):
    accelerator = Accelerator(backend=backend, mixed_precision="bf16")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = accelerator.train_step(lambda model, x: model(x).square().mean(), model, optimizer)
    return accelerator, step, torch.ones(512, 1024).to(accelerator.device)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_trace_has_events_of_the_device(backend, tmp_path):
    accelerator, step, batch = prepared(backend)
    option = {"wait": 1, "warmup": 1, "active": 2, "repeat": 1}
    with accelerator.profile(ProfileKwargs(schedule_option=option, output_trace_dir=tmp_path)) as profile:
        for _ in range(5):
            step(batch)
            profile.step()
    file = next(file for file in profile.files if ".json" in file.name)
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    events = json.loads(content)["traceEvents"]
    if backend == "torch":
        assert any(event.get("cat") == "kernel" for event in events)
    else:  # a process of the trace for every device
        assert any("GPU" in str(event.get("args", {}).get("name", "")) for event in events if event.get("ph") == "M")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_bar_knows_the_memory_of_the_device_and_its_peak(backend, capsys):
    accelerator, step, batch = prepared(backend)
    engine = accelerator._engine
    step(batch)
    used, limit = engine.device_memory()
    assert used > 4 * 2 * 1024 * 4096, "the parameters alone"
    assert limit > used
    for _ in accelerator.progress(range(50), flops_per_step=6 * 2 * 1024 * 4096 * 512, batch_size=512):
        step(batch)
    settle(10.0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "GiB" in line
    assert ("MFU" in line) == (peak_of(engine.device_name) is not None)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_fence_is_passed_when_the_device_is_done(backend):
    accelerator, step, batch = prepared(backend)
    for _ in range(20):
        step(batch)
    fence = accelerator._engine.fence()
    if fence is not None:
        fence()
    accelerator._engine.synchronize()
    assert accelerator._engine.fence() is None
