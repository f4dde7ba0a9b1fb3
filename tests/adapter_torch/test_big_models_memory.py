"""A model on disk takes the memory of about one layer, to load and to run; measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import big_memory
import pytest
import torch
from safetensors.torch import save_file

LAYER = 4 * big_memory.SIZE**2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak can only be reset on Linux")
def test_a_model_on_disk_takes_about_one_layer_of_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = big_memory.build()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(torch.ones(1, big_memory.SIZE) / big_memory.SIZE).double().sum().item()
    took = {}
    for where in ("disk", "cpu"):
        command = [sys.executable, big_memory.__file__, str(tmp_path), where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        took[where] = json.loads(done.stdout)
        # Another number of threads sums in another order.
        assert took[where]["output"] == pytest.approx(expected, rel=1e-4)
    assert took["disk"]["load"] < LAYER  # the index and headers alone
    assert took["disk"]["all"] < 2 * LAYER
    assert took["cpu"]["all"] > (big_memory.LAYERS - 1) * LAYER  # the measure sees what is in memory
    assert (
        took["cpu"]["load"] < (big_memory.LAYERS + 6) * LAYER
    )  # beside the model, at most 64 MiB of the file, and a layer
