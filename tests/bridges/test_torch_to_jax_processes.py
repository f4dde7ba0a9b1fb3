"""A torch loop on jax in a job of two processes with two devices each: every process sees its own samples and its own values."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from launching import with_devices

SCRIPT = """
import json
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from polyaccel import Accelerator

torch.set_num_threads(1)

def script(acc):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    weight = torch.tensor([1.0, 2.0, 3.0])
    loader = DataLoader(TensorDataset(x, y), batch_size=4 if acc else 16)
    if acc:
        model, optimizer, loader = acc.prepare(model, optimizer, loader)
    losses, predicted, total = [], [], 0
    for inputs, labels in loader:
        out = model(inputs)
        assert out.shape == (8 if acc else 16, 3)
        loss = (F.cross_entropy(out, labels, reduction="none") * weight[labels]).sum() / inputs.size(0)
        total = total + loss.detach()
        if acc:
            early = loss.item()
            acc.backward(loss)
            assert abs(early - loss.item()) < 1e-6
            losses.append(acc.reduce(loss.detach(), "mean").item())
            predicted += acc.gather(out.argmax(-1)).tolist()
        else:
            loss.backward()
            losses.append(loss.item())
            predicted += out.argmax(-1).tolist()
        optimizer.step()
        optimizer.zero_grad()
    losses.append((acc.reduce(total, "mean") if acc else total).item())
    model.eval()
    with torch.no_grad():
        losses.append(model(x[:8]).sum().item())
    return losses, predicted, {name: value.tolist() for name, value in model.state_dict().items()}

class Shuffled(IterableDataset):
    def __iter__(self):  # each process would read another order
        generator = torch.Generator().manual_seed(acc.process_index)
        return iter(torch.randperm(22, generator=generator).tolist())

def dispatched():
    loader = acc.prepare(DataLoader(Shuffled(), batch_size=2))
    assert all(len(batch) == 4 for batch in loader)
    return [sample for batch in loader for sample in acc.gather_for_metrics(batch).tolist()]

acc = Accelerator(backend="jax")
print("RESULT", json.dumps([script(acc), script(None), dispatched()]), flush=True)
acc.end_training()
"""


@pytest.mark.slow
def test_two_processes_train_like_one_torch_process_on_the_whole_batch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **with_devices(2),
        }
        workers.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SCRIPT],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for output in outputs:
        line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
        assert line is not None, output
        (losses, predicted, state), (expected, classes, reference), sent = json.loads(line.removeprefix("RESULT "))
        assert sent == torch.randperm(22, generator=torch.Generator().manual_seed(0)).tolist(), (
            "process 0 reads for all"
        )
        assert losses == pytest.approx(expected, abs=1e-5)  # float32, sums in another order over two steps
        assert predicted == classes
        for name, value in reference.items():
            flat = [value] if isinstance(value[0], float) else value
            for row, other in zip(flat, [state[name]] if isinstance(value[0], float) else state[name], strict=True):
                assert other == pytest.approx(row, abs=1e-5)
