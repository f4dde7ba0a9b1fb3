"""What SPMD on torch_xla cannot do is refused by name, with the way out, before anything is changed."""

import subprocess
import sys

import pytest
import torch
from adapter_xla.cases import MLP

from polyaccel import Accelerator
from polyaccel.config import Config
from polyaccel.errors import BackendUnavailableError, LaunchError, PolyaccelError, PrepareError, UnsupportedError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel_xla.backend import XlaBackend


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'.*bf16"),
        ({"mesh": {"sequence": 2}}, "mesh.sequence=2"),
        ({"mesh": {"fsdp": 3}}, "fsdp=3"),
        ({"compile": True}, "compile=True.*every step already"),
        ({"mesh": {"data": 3}}, "data=3 needs 3 devices.*has 4"),
    ],
)
def test_settings_outside_the_capabilities_are_refused_with_a_hint(arguments, named):
    with pytest.raises(PolyaccelError, match=f"(?s){named}") as caught:
        Accelerator(backend="xla", **arguments)
    assert caught.value.hint


def test_a_replica_axis_is_data_parallel_too():
    accelerator = Accelerator(backend="xla", mesh={"replica": 2, "data": 2})
    assert accelerator.num_data_shards == 4
    model = accelerator.prepare(torch.nn.Linear(2, 1))
    loader = accelerator.prepare(
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 2)), batch_size=2)
    )
    (batch,) = next(iter(loader))
    accelerator.backward(model(batch).mean())
    torch.testing.assert_close(model.weight.grad.cpu(), torch.ones(1, 2))


def test_more_than_one_process_per_host_is_refused_before_anything_starts():
    with pytest.raises(LaunchError, match=r"--num-processes 4.*1 process per host") as caught:
        XlaBackend().worker_slots(4, use_cpu=True)
    assert "CPU_NUM_DEVICES" in caught.value.hint
    assert len(XlaBackend().worker_slots(None, use_cpu=False)) == 1
    assert XlaBackend().worker_slots(1, use_cpu=True)[0].environment == {"PJRT_DEVICE": "CPU"}


def test_a_launcher_that_started_two_processes_on_this_host_is_refused():
    started = Rendezvous(0, 2, 0, 2, "127.0.0.1", 29500)
    with pytest.raises(LaunchError, match=r"2 processes were started on this host.*1 per host"):
        XlaBackend().open(Config(), started)


def test_more_hosts_than_the_runtime_connects_are_refused():
    started = Rendezvous(0, 2, 0, 1, "127.0.0.1", 29500)
    with pytest.raises(LaunchError, match="started 2 processes, but the CPU runtime of torch_xla connects 1"):
        XlaBackend().open(Config(), started)


def test_an_optimizer_of_another_model_is_refused_and_names_a_parameter():
    accelerator = Accelerator(backend="xla")
    model, other = MLP(), MLP()
    with pytest.raises(PrepareError, match=r"SGD.*\(16, 8\)"):
        accelerator.prepare(model, torch.optim.SGD(other.parameters(), 0.1))


def test_an_optimizer_before_its_model_is_refused():
    accelerator = Accelerator(backend="xla")
    with pytest.raises(PrepareError, match="before its model"):
        accelerator.prepare(torch.optim.SGD(MLP().parameters(), 0.1))


def test_wrappers_of_other_engines_are_refused():
    accelerator = Accelerator(backend="xla")
    with pytest.raises(PrepareError, match="DataParallel exchanges gradients"):
        accelerator.prepare(torch.nn.DataParallel(MLP()))
    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
        accelerator.prepare(torch.compile(MLP(), backend="eager"))


def test_a_loss_function_that_returns_no_loss_is_named():
    accelerator = Accelerator(backend="xla")
    model = accelerator.prepare(MLP())
    with pytest.raises(PrepareError, match="returned a dict where a loss"):
        accelerator.backward(lambda m: {"loss": m}, model)


def test_a_backward_pass_before_the_runtime_is_refused_with_the_reason():
    script = (
        "import torch\n"
        "torch.ones(1, requires_grad=True).sum().backward()\n"
        "from polyaccel import Accelerator\n"
        "Accelerator(backend='xla', cpu=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert BackendUnavailableError.__name__ in result.stderr
    assert "hint: create the Accelerator before the first backward pass" in result.stderr


def test_a_compilation_cache_that_cannot_be_used_is_said_in_the_log(caplog, tmp_path):
    Accelerator(backend="xla", compilation_cache=str(tmp_path / "graphs"))
    assert "compilation_cache=" in caplog.text
    assert "the CPU runtime cannot load them" in caplog.text
    assert not (tmp_path / "graphs").exists()


def test_the_probe_imports_nothing_and_says_what_is_missing(monkeypatch):
    import importlib.metadata
    import importlib.util

    assert XlaBackend().probe().is_usable
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.13.0", "torch_xla": "2.9.0"}[name])
    probe = XlaBackend().probe()
    assert not probe.is_usable
    assert probe.reason == "torch_xla 2.9.0 is built for torch 2.9, and torch 2.13.0 is installed"
    assert "pip install 'polyaccel[xla]'" in probe.cure
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_xla" else object())
    probe = XlaBackend().probe()
    assert probe.reason == "torch_xla not installed"
    assert probe.cure == "pip install 'polyaccel[xla]'"
