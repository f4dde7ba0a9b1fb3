"""Run by test_accumulation_processes.py in both processes of a job on torch: which micro batches exchange gradients, and how far
schedules move."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator, DistributedType, PolyaccelError
from polyaccel.utils import GradientAccumulationPlugin

RANK = Accelerator(cpu=True).process_index


def training(**arguments):
    """One weight; the gradient of a batch is 1 on process 0 and 3 on process 1, and 2 once it is exchanged."""
    accelerator = Accelerator(cpu=True, **arguments)
    module = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rows = torch.tensor([[1.0], [3.0]] * 3)
    loader = DataLoader(TensorDataset(rows), batch_size=2 if accelerator.split_batches else 1)
    return accelerator, *accelerator.prepare(module, optimizer, scheduler, loader)


def grad(model):
    return next(model.parameters()).grad.item()


own = [1.0, 3.0][RANK]

# accumulate(model): only the last micro batch of a window is exchanged, and with it what was added up before.
accelerator, model, optimizer, scheduler, loader = training(gradient_accumulation_steps=2)
assert accelerator.distributed_type is DistributedType.MULTI_CPU
assert accelerator.use_distributed
seen = []
for (x,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).mean())
        seen.append(grad(model))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
assert seen == [own / 2, 2.0, 1.0], seen  # three batches: a whole window and a short one
assert optimizer.param_groups[0]["lr"] == 0.5**4  # two updates, two processes

# sync_each_batch: every one is.
plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
accelerator, model, optimizer, scheduler, loader = training(gradient_accumulation_plugin=plugin)
seen = []
for (x,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).mean())
        seen.append(grad(model))
        optimizer.zero_grad()
assert seen == [1.0, 2.0, 1.0], seen
# What is exchanged in every micro batch is the same in the end: train_step takes two updates from the mean gradient 2 and half of it.
accelerator, model, optimizer, _, loader = training(gradient_accumulation_plugin=plugin)
before = next(model.parameters()).item()
step = accelerator.train_step(lambda model, batch: model(batch[0]).mean(), model, optimizer)
for batch in loader:
    step(batch)
assert abs(next(model.parameters()).item() - (before - 3.0)) < 1e-6

# no_sync, and the backward that exchanges what several forward passes without an exchange have left.
accelerator, model, *_, loader = training()
losses = []
for (x,) in loader:
    with accelerator.no_sync(model):
        losses.append(model(x).mean())
accelerator.backward(losses[0])
assert grad(model) == own
accelerator.backward(losses[1])
assert grad(model) == 2 * own
with accelerator.trigger_sync_in_backward(model):
    accelerator.backward(losses[2])
assert grad(model) == 6.0  # the mean of 3 and 9
accelerator.backward(model(torch.ones(1, 1) * own).mean())
assert grad(model) == 8.0  # and the exchange goes on as before

# Schedules with batches that are cut over the processes, and with steps of their own.
accelerator, *_, scheduler, _ = training(split_batches=True)
scheduler.step()
assert scheduler.scheduler.last_epoch == 1
accelerator, *_, scheduler, _ = training(step_scheduler_with_optimizer=False)
scheduler.step()
assert scheduler.scheduler.last_epoch == 1

# The user's own module computes in the mixed precision too, in several processes as in one.
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
module = nn.Linear(3, 8)
model = accelerator.prepare(module)
x = torch.ones(1, 3)
assert accelerator.unwrap_model(model) is module
assert torch.equal(module(x), model(x))
exact = nn.functional.linear(x, module.weight, module.bias)
assert not torch.equal(module(x), exact)
assert torch.equal(accelerator.unwrap_model(model, keep_fp32_wrapper=False)(x), exact)
assert accelerator.prepare(model) is model

# A model that is spread over devices by a device_map is not trained by several processes.
spread = nn.Sequential(nn.Linear(1, 1))
spread[0].hf_device_map = {"weight": "cpu", "bias": "disk"}
with pytest.raises(PolyaccelError, match="argument 1 of prepare, a Sequential, is spread over devices"):
    accelerator.prepare(None, spread)
assert accelerator.prepare_model(spread, evaluation_mode=True) is spread

if accelerator.is_main_process:
    print("accumulation holds")
accelerator.state.destroy_process_group()
