"""Run by test_big_models_memory: the most memory that loading and one forward took, in bytes beyond what torch itself takes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

from polyaccel import init_empty_weights, load_checkpoint_and_dispatch

LAYERS, SIZE = 10, 2048  # 16 MiB a layer


def build() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main(folder: str, where: str) -> None:
    torch.set_num_threads(1)
    x = torch.ones(1, SIZE) / SIZE
    with torch.no_grad():
        nn.Linear(SIZE, 8)(x)  # what torch allocates once
        with init_empty_weights():
            model = build()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        model = load_checkpoint_and_dispatch(
            model, Path(folder) / "model.safetensors", {"": where}, offload_folder=Path(folder) / "offload"
        )
        loaded = _status("VmHWM")
        output = model(x).double().sum().item()
    print(json.dumps({"load": loaded - before, "all": _status("VmHWM") - before, "output": output}))


if __name__ == "__main__":
    main(*sys.argv[1:])
