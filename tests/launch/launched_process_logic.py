"""Run by test_process_logic.py in every process of a job of two, with --debug: triggers, debug mode, averages of parameters, LocalSGD."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import EMA, Accelerator, LocalSGD
from polyaccel.errors import PolyaccelError

accelerator = Accelerator(cpu=True)
rank, n = accelerator.process_index, accelerator.num_processes
assert (n, accelerator.config.debug) == (2, True)


def refused(action, *fragments):
    with pytest.raises(PolyaccelError) as caught:
        action()
    for fragment in fragments:
        assert fragment in str(caught.value)


def same(actual, expected, **options):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **options)


# -- triggers ---------------------------------------------------------------------------------------------------------------

assert not accelerator.check_trigger()
if rank == 1:
    accelerator.set_trigger()
assert accelerator.check_trigger()  # on both
assert not accelerator.check_trigger()  # once
accelerator.set_trigger()
assert accelerator.check_trigger()
assert not accelerator.check_trigger()  # raised twice, found once

# -- debug mode -------------------------------------------------------------------------------------------------------------

X = torch.arange(80.0).reshape(40, 2).sin()
Y = X.sum(1, keepdim=True).cos()
torch.manual_seed(3)
module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
copies = [nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(n)]
for copy in copies:
    copy.load_state_dict(module.state_dict())
optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
batch_size = 4 * n // accelerator.num_data_shards
loader = DataLoader(TensorDataset(X, Y), batch_size=batch_size)
model, optimizer, loader = accelerator.prepare(module, optimizer, loader)

refused(
    lambda: accelerator.gather(torch.zeros(2 + rank)),
    "gather needs arrays of one shape and dtype on all processes",
    "process 0: (2,) float32; process 1: (3,) float32",
)
refused(
    lambda: accelerator.reduce([torch.zeros(3), torch.zeros(3, dtype=[torch.float32, torch.int32][rank])]),
    "reduce(sum)",
    "value 1 of 2",
    "process 0: (3,) float32; process 1: (3,) int32",
)
refused(
    lambda: accelerator.gather(torch.zeros(2)) if rank == 0 else accelerator.reduce(torch.zeros(2), "mean"),
    "the processes called different collectives (process 0: gather at",
    "; process 1: reduce at",
    "launched_process_logic.py:",
)
refused(
    lambda: accelerator.gather_object([1]) if rank == 0 else accelerator.check_trigger(),
    "process 0: gather_object at",
    "process 1: check_trigger at",
)
refused(lambda: accelerator.broadcast(torch.zeros(2), from_process=rank), "broadcast(from_process=1)")
refused(lambda: accelerator.gather([torch.zeros(2)] * (rank + 1)), "process 0: 1 values; process 1: 2 values")
refused(lambda: accelerator.pad_across_processes(torch.zeros([2] * (rank + 1))), "process 1: 2 dims float32")
same(accelerator.gather(torch.tensor([rank])), [0, 1])  # and the job goes on
same(accelerator.pad_across_processes(torch.ones(rank + 1)).shape, [2])
assert accelerator.broadcast_object_list([rank], from_process=1) == [1]


# -- averages over steps ----------------------------------------------------------------------------------------------------


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def flat(module):
    return torch.cat([torch.as_tensor(np.asarray(p.detach())).flatten() for p in module.parameters()])


def per_process(module):
    return np.asarray(accelerator.gather(flat(module)[None]))  # (process, parameters)


ema = EMA(model, decay=0.5)
start = flat(model)

if "gradient_sync" not in accelerator._features:
    refused(lambda: LocalSGD(accelerator, model, 2), "all 4 share one set", "backend='torch'")
    with LocalSGD(accelerator, model, 2, enabled=False) as local_sgd:
        for batch in loader:
            accelerator.backward(loss_fn, model, batch)
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            ema.update()
else:
    # What both processes do, in this one: batch i of process r holds rows 4 * (2 * i + r) and the three that follow.
    optimizers = [torch.optim.SGD(copy.parameters(), lr=0.3, momentum=0.9) for copy in copies]
    for step in range(5):
        for index, (copy, local) in enumerate(zip(copies, optimizers, strict=True)):
            rows = slice(4 * (2 * step + index), 4 * (2 * step + index) + 4)
            local.zero_grad()
            loss_fn(copy, (X[rows], Y[rows])).backward()
            local.step()
        if step in (1, 3, 4):
            with torch.no_grad():
                for first, second in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
                    mean = (first + second) / 2
                    first.copy_(mean)
                    second.copy_(mean)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    are_equal = []
    with LocalSGD(accelerator, model, 2) as local_sgd:
        for batch in loader:
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            ema.update()
            rows = per_process(module)
            are_equal.append(bool((rows[0] == rows[1]).all()))
    assert are_equal == [False, True, False, True, False], are_equal
    rows = per_process(module)
    same(rows[0], rows[1], rtol=0)
    same(rows[0], flat(copies[0]), rtol=1e-6, atol=1e-7)
    assert addresses == [parameter.data_ptr() for parameter in module.parameters()]

    # Gradients are exchanged again: other data on each process, and the parameters stay equal.
    optimizer.optimizer.state.clear()  # momentum is each process's own
    accelerator.backward(loss_fn(model, next(iter(loader))))
    optimizer.step()
    optimizer.zero_grad()
    rows = per_process(module)
    same(rows[0], rows[1], rtol=0)
    assert not np.array_equal(rows[0], flat(copies[0]))

    before = flat(module) + rank
    with torch.no_grad():
        nn.utils.vector_to_parameters(before, module.parameters())
    with pytest.raises(KeyError), LocalSGD(accelerator, model, 2):
        raise KeyError
    same(flat(module), before)  # after an exception nothing is averaged: the others may not be there
    half = Accelerator(cpu=True, mixed_precision="fp16")
    other = half.prepare(nn.Linear(2, 1))
    refused(lambda: LocalSGD(half, other, 2), "mixed_precision='fp16'", "loss scale")

refused(lambda: LocalSGD(accelerator, model, 0), "local_sgd_steps=0")
refused(lambda: LocalSGD(accelerator, nn.Linear(2, 1), 2), "is not a prepared model")

present = flat(model)
with ema.applied():
    averages = flat(model)
same(flat(model), present, rtol=0)
assert not np.allclose(averages, present)
assert not np.allclose(averages, start)
accelerator.print("the logic of processes holds")
accelerator.end_training()
