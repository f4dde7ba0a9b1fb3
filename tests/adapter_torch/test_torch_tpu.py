"""TPUs through torch_tpu, as far as a machine without one can show: what is chosen, with which processes and process group.

The fakes answer as torch_tpu 0.2.0 is written. On a real TPU `polyaccel test --backend torch` is the test.
"""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from polyaccel import registry, tpus
from polyaccel.cli import doctor
from polyaccel.cli.main import main
from polyaccel.errors import LaunchError, UnsupportedError
from polyaccel.precision import PrecisionPolicy
from polyaccel.protocols import Probe
from polyaccel_torch import tpu
from polyaccel_torch.backend import TorchBackend
from polyaccel_torch.precision import autocast_of

# As `python -m torch.tpu.distributed` prints it on a host with four chips.
TOLD = """Registered Python module for 'tpu'.
TORCH_TPU_TOPOLOGY="2,2,1"
TORCH_TPU_SLICEBUILDER_ADDRESSES="localhost:1,localhost:2,localhost:3,localhost:4"
TORCH_TPU_XPROF_SESSION_ID="7"
WORLD_SIZE=4
NODE_RANK="0"
"""


def bus(folder: Path, *devices: str) -> Path:
    """A PCI bus with these of Google's devices, and one of somebody else."""
    for number, (vendor, device) in enumerate([("0x8086", "0x0062"), *(("0x1ae0", name) for name in devices)]):
        place = folder / f"0000:00:{number:02x}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"{vendor}\n")
        (place / "device").write_text(f"{device}\n")
    return folder


@pytest.fixture
def chips(tmp_path, monkeypatch):
    """Four chips of v5e and a network card."""
    monkeypatch.setattr(tpus, "PCI_DEVICES", bus(tmp_path / "bus", *["0x0063"] * 4, "0x0042"))


@pytest.fixture
def torch_tpu(tmp_path, monkeypatch):
    """A torch that has loaded torch_tpu."""
    (tmp_path / "site" / "torch_tpu").mkdir(parents=True)
    (tmp_path / "site" / "torch_tpu" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    module = types.SimpleNamespace(device_count=lambda: 4, is_initialized=lambda: True)
    monkeypatch.setattr(torch, "tpu", module, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    told = subprocess.CompletedProcess([], 0, TOLD, "")
    monkeypatch.setattr(tpu.subprocess, "run", lambda *args, **kwargs: told)


def test_chips_are_counted_and_network_cards_are_not(chips):
    assert tpus.num_local_chips() == 4


def test_a_machine_without_a_bus_has_no_chips(tmp_path, monkeypatch):
    monkeypatch.setattr(tpus, "PCI_DEVICES", tmp_path / "none")
    assert tpus.num_local_chips() == 0


def test_torch_computes_on_the_cpu_where_torch_tpu_is_not_installed(chips):
    assert TorchBackend().probe().device is None
    assert TorchBackend().worker_slots(None, use_cpu=True)[0].environment == {}
    assert tpu.num_devices() == 0


def test_torch_starts_a_process_for_each_tpu_device_with_what_torch_tpu_asks_for(chips, torch_tpu):
    backend = TorchBackend()
    assert backend.probe().device == "tpu"
    slots = backend.worker_slots(None, use_cpu=False)
    assert len(slots) == 4
    assert slots[0].environment == {
        "TORCH_TPU_TOPOLOGY": "2,2,1",
        "TORCH_TPU_SLICEBUILDER_ADDRESSES": "localhost:1,localhost:2,localhost:3,localhost:4",
        "TORCH_TPU_XPROF_SESSION_ID": "7",
        "GROUP_RANK": "0",
    }
    assert [slot.environment for slot in backend.worker_slots(1, use_cpu=False)] == [{}]
    assert len(backend.worker_slots(2, use_cpu=True)) == 2
    with pytest.raises(LaunchError, match=r"--num-processes 2 .*4 TPU devices"):
        backend.worker_slots(2, use_cpu=False)
    assert "TPU" in (backend.holds_devices() or "")


def test_what_torch_tpu_cannot_prepare_is_told_in_its_words(chips):
    # This torch has no torch.tpu: the command fails as it would beside a broken installation.
    with pytest.raises(LaunchError, match=r"torch_tpu could not prepare .*torch\.tpu") as caught:
        tpu.launch_environment()
    assert "-m torch.tpu.distributed" in caught.value.hint


def test_fp16_on_a_tpu_is_refused():
    with pytest.raises(UnsupportedError, match="mixed_precision='fp16' on a TPU"):
        autocast_of(PrecisionPolicy.of("fp16"), types.SimpleNamespace(type="tpu"))


JOINING = """
import torch, types
from pathlib import Path
from polyaccel import tpus
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel_torch import parallel, tpu

tpus.PCI_DEVICES = Path({bus!r})
torch.utils.rename_privateuse1_backend("tpu")
torch.tpu = types.SimpleNamespace(device_count=lambda: 4, is_initialized=lambda: True)
torch.accelerator.current_device_index = lambda: met[0]
met, asked = [], []

def connect(place, device, process_group, *timeouts):
    asked.append((str(device), process_group))
    met.append(0)  # a process knows its device when all have met

parallel._connect, parallel._host_exchange = connect, lambda *args: None
parallel.ProcessCollectives = lambda *args: None
four = Rendezvous(2, 4, 2, 4, "127.0.0.1", 29500)
job = parallel.join(four, use_cpu=False)
print(asked, job.device, job.topology.device_kind)
print(parallel.choose_device(four, use_cpu=True))
print(parallel.join(Rendezvous(0, 1, 0, 1, None, None), use_cpu=False).device)
"""


def test_a_job_on_tpus_joins_by_torch_tpus_process_group_before_it_asks_for_its_device(tmp_path):
    (tmp_path / "torch_tpu").mkdir()
    (tmp_path / "torch_tpu" / "__init__.py").write_text("")
    script = tmp_path / "joining.py"  # its folder is on its path: that is where torch_tpu is found
    script.write_text(JOINING.format(bus=str(bus(tmp_path / "bus", *["0x0063"] * 4))))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["[('tpu', 'tpu_dist')] tpu:0 tpu", "cpu", "tpu:0"], done.stderr


class Engine:
    """A backend as far as the choice asks it."""

    def __init__(self, name, dialect, **probe):
        self.name = name
        self.capabilities = types.SimpleNamespace(dialect=dialect)
        self.probe = lambda: Probe(is_usable=True, **probe)


def chosen(monkeypatch, *engines):
    by_name = {engine.name: engine for engine in engines}
    monkeypatch.setattr(registry, "backend_names", lambda: list(by_name))
    monkeypatch.setattr(registry, "load_backend", by_name.__getitem__)
    backend, why = registry.automatic_choice()
    return backend.name, why


def test_auto_is_xla_where_torch_does_not_find_the_tpu_and_torch_where_it_does(monkeypatch):
    xla = Engine("xla", "torch", device="tpu")
    name, why = chosen(monkeypatch, Engine("torch", "torch", is_loaded=True), xla, Engine("jax", "flax"))
    assert (name, "alone finds the TPU" in why) == ("xla", True)
    name, why = chosen(monkeypatch, Engine("torch", "torch", is_loaded=True, device="tpu"), xla)
    assert (name, why) == ("torch", "its framework is loaded, and it computes on the TPU of this machine")
    name, _ = chosen(monkeypatch, Engine("torch", "torch", device="tpu"), Engine("xla", "torch", is_loaded=True))
    assert name == "torch"  # torch_xla is loaded, and finds no TPU: it would compute on the CPU
    name, why = chosen(monkeypatch, Engine("torch", "torch"), Engine("xla", "torch"))
    assert (name, why) == ("torch", "the first of torch, xla, the installed ones")


def test_doctor_says_which_engine_auto_is_and_why(chips, torch_tpu, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check", lambda *args, **kwargs: iter(()))
    assert main(["doctor", "--backend", "torch"]) == 0
    out = capsys.readouterr().out
    assert "this machine has 4 TPU chips: jax with libtpu, torch with torch_tpu, xla with torch_xla[tpu]" in out
    assert 'backend "auto": torch (its framework is loaded, and it computes on the TPU of this machine)' in out
