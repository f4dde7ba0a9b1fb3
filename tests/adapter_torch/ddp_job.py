"""Run in each process of a two-process gloo job by test_torch_ddp_settings.py: one function per question, answers as JSON.

Nothing is judged here. Every function is called on both processes, in this order; the first one's Accelerator makes the process group.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from polyaccel import (
    Accelerator,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from polyaccel.errors import UnsupportedError


def accelerator(*handlers, **arguments):
    return Accelerator(backend="torch", cpu=True, kwargs_handlers=handlers, **arguments)


def model():
    torch.manual_seed(0)
    return nn.Linear(32, 16)


def samples(run, step):
    """Other ones on every process and in every step."""
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(10 * step + run.process_index))


def gradients(run, prepared, step):
    prepared.zero_grad()
    run.backward((prepared(samples(run, step)) ** 3).mean())
    return [parameter.grad.flatten().tolist() for parameter in prepared.parameters()]


def joined():
    run = accelerator(InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=77)))
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    return [run.config.timeout_s, group.options._timeout.total_seconds(), dist.get_backend()]


def own_gradients():
    """Of this process alone, before any exchange."""
    run = accelerator()
    alone = model()
    return [gradients(run, alone, step) for step in range(3)]


def hook(name, wrapper="no", **options):
    def answer():
        settings = DistributedDataParallelKwargs(
            comm_hook=DDPCommunicationHookType(name), comm_wrapper=wrapper, comm_state_option=options
        )
        run = accelerator(settings)
        prepared = run.prepare(model())
        return [gradients(run, prepared, step) for step in range(3)]

    return answer


def refused():
    said = []
    for settings in ({"comm_hook": "bf16"}, {"comm_hook": "power_sgd", "comm_wrapper": "bf16"}):
        try:
            accelerator(DistributedDataParallelKwargs(**settings)).prepare(model())
        except UnsupportedError as error:
            said.append(error.message)
    return said


POWER = {"start_powerSGD_iter": 2, "matrix_approximation_rank": 1}


def ddp():
    handler = DistributedDataParallelKwargs(
        bucket_cap_mb=15, find_unused_parameters=True, gradient_as_bucket_view=False, static_graph=True
    )
    prepared = accelerator(handler).prepare(model())
    usual = accelerator().prepare(model())
    return [
        [one.bucket_bytes_cap >> 20, one.find_unused_parameters, one.gradient_as_bucket_view, one.static_graph]
        for one in (prepared, usual)
    ]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.used(x)


def unused_parameters():
    """Two steps of a model with parameters that its loss does not depend on."""
    said = []
    for handlers in ([DistributedDataParallelKwargs(find_unused_parameters=True)], []):
        run = accelerator(*handlers)
        prepared = run.prepare(Two())
        try:
            for _ in range(2):
                run.backward(prepared(torch.ones(2, 4)).sum())
            said.append("trained")
        except RuntimeError as error:
            said.append("find_unused_parameters" in str(error))
    return said


def buffers():
    """Running means before and after a forward pass begins with those of process 0, or does not."""
    means = []
    for broadcast in (True, False):
        run = accelerator(DistributedDataParallelKwargs(broadcast_buffers=broadcast))
        prepared = run.prepare(nn.BatchNorm1d(1, momentum=1.0))
        for _ in range(2):
            prepared(torch.full((4, 1), float(run.process_index + 1)))
        before = prepared.module.running_mean.clone()
        prepared.module.momentum = 0.0  # the next forward pass changes nothing of its own
        prepared(torch.zeros(4, 1))
        means.append([before.item(), prepared.module.running_mean.item()])
    return means


QUESTIONS = {
    "joined": joined,
    "own": own_gradients,
    "no": hook("no"),
    "fp16": hook("fp16"),
    "power_sgd": hook("power_sgd", **POWER),
    "power_sgd_fp16": hook("power_sgd", "fp16", **POWER),
    "batched_power_sgd": hook("batched_power_sgd", **POWER),
    "bf16": refused,
    "ddp": ddp,
    "unused_parameters": unused_parameters,
    "buffers": buffers,
}

if __name__ == "__main__":
    answers = {name: question() for name, question in QUESTIONS.items()}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(answers))
