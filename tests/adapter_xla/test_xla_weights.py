"""Weights of a model on torch-xla, for other libraries."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from polyaccel import Accelerator


def test_save_model_writes_present_values_of_every_array_once(tmp_path: Path) -> None:
    accelerator = Accelerator(backend="xla", cpu=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight  # tied
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(prepared(torch.ones(8, 3, device=accelerator.device)).square().mean())
    optimizer.step()
    accelerator.save_model(prepared, tmp_path, max_shard_size=100)
    written = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    state = accelerator.get_state_dict(prepared)
    assert set(state) - set(written) == {"2.weight"}
    assert all(torch.equal(written[name], state[name].cpu()) for name in written)
    assert len(list(tmp_path.iterdir())) > 2
