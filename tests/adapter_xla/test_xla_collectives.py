"""Between hosts: host values travel over gloo. Two processes on this machine stand for two hosts; no device is needed for that."""

import socket
import subprocess
import sys

import numpy as np
import torch

from polyaccel import Accelerator

WORKER = """
import os, sys, time, numpy as np, torch
from polyaccel.errors import CollectiveError
from polyaccel_xla.collectives import SpmdCollectives, join
rank, port = int(sys.argv[1]), int(sys.argv[2])
assert join(rank, 2, "127.0.0.1", port)
assert "torch_xla" not in sys.modules
c = SpmdCollectives(rank, 2, lambda: None)
assert c.all_gather(torch.tensor([[rank, 5]])).tolist() == [[0, 5], [1, 5]]
assert c.all_gather(np.float32(rank)).tolist() == [0.0, 1.0]
assert c.all_reduce(torch.tensor([1.0 + rank]), "mean").tolist() == [1.5]
assert c.all_reduce(torch.tensor([1.0 + rank]), "sum").tolist() == [3.0]
assert c.all_reduce(torch.tensor([1 + rank]), "max").tolist() == [2]
assert c.broadcast(torch.tensor([rank]), 1).tolist() == [1]
objects = c.all_gather_object({"rank": rank, "text": "x" * (1 + 100 * rank), "rows": np.arange(rank)})
assert [o["rank"] for o in objects] == [0, 1] and len(objects[1]["text"]) == 101 and len(objects[0]["rows"]) == 0
c.barrier("end")
def refused(action, *words):
    try:
        action()
    except CollectiveError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("nothing was raised")
refused(lambda: c.all_gather(torch.zeros(2 + rank)), "all_gather needs", "process 0: (2,)", "process 1: (3,)")
refused(lambda: c.barrier("end") if rank else c.all_gather_object(1), "process 0: all_gather_object at", "process 1: barrier at")
if rank == 0:
    c.calls.timeout_s = 1
    refused(lambda: c.barrier("late"), "has waited 1 s (timeout_s) for process 1: process 1 is at <string>:")
else:
    time.sleep(2.5)
    os._exit(print("done", flush=True) or 0)
print("done", flush=True)
os._exit(0)  # the group has failed
"""


def test_host_values_are_exchanged_between_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert output.strip().endswith("done")


def test_a_device_tensor_is_the_global_value_already():
    accelerator = Accelerator(backend="xla")
    collectives = accelerator._engine.collectives
    x = torch.arange(8.0).to(accelerator.device)
    assert collectives.all_gather(x) is x
    for operation in ("sum", "mean", "max", "min"):
        assert torch.equal(collectives.all_reduce(x, operation).cpu(), x.cpu())
    assert collectives.all_gather(x.sum()).shape == (1,)
    assert torch.equal(collectives.broadcast(x, 0).cpu(), x.cpu())


def test_one_process_keeps_host_values():
    collectives = Accelerator(backend="xla")._engine.collectives
    array = np.arange(3)
    assert collectives.all_gather(array) is array
    assert collectives.all_reduce(torch.tensor([2.0]), "sum").tolist() == [2.0]
    assert collectives.all_gather_object({"a": (1, b"x")}) == [{"a": (1, b"x")}]
    collectives.barrier("test")
