"""One process of a job whose processes give a recorded loop, and a loss function, values of their own. Not a test itself."""

from __future__ import annotations

import torch
from answering import leave, run_job
from torch.nn import functional

from polyaccel import Accelerator
from polyaccel.errors import PrepareError

NUM_STEPS, NUM_PROCESSES = 4, 2


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 8), torch.nn.Linear(8, 10)

    def forward(self, x, shift=None):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden if shift is None else hidden + shift).view(x.shape[0], 2, 5)


def model():
    torch.manual_seed(0)
    return Shifted()


def rows(process, step):
    made = torch.Generator().manual_seed(100 * process + step)
    return torch.randn(4, 3, generator=made), torch.randint(0, 5, (4, 2), generator=made)


def share(process, step):
    """A number that is another one on each process."""
    return 0.1 + 0.7 * process + 0.05 * step


def loop_loss(net, process, step):
    """Flattened targets, a tensor and Python numbers of this process: beside the model's output, and beside parameters alone."""
    x, y = rows(process, step)
    number = share(process, step)
    loss = functional.cross_entropy(net(x).view(-1, 5), y.reshape(-1)) * (1 + number)
    decay = torch.tensor(number) * net.first.weight.pow(2).sum()
    return loss + decay + net.second.weight.abs().sum() * number / (3 + process)


def scaled_loss(net, batch, factor):
    x, y = batch
    return factor * functional.cross_entropy(net(x).view(-1, 5), y.reshape(-1))


def accelerator(partitioning):
    return Accelerator(backend="jax", cpu=True, compilation_cache="off", partitioning=partitioning)


def loop(partitioning):
    run = accelerator(partitioning)
    net = model()
    net, optimizer = run.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    losses = []
    for step in range(NUM_STEPS):
        loss = loop_loss(net, run.process_index, step)
        run.backward(loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    state = run.get_state_dict(net)
    return {"losses": losses, "state": {name: value.ravel().tolist() for name, value in state.items()}}


def refused(partitioning):
    run = accelerator(partitioning)
    net = run.prepare(model())
    me = run.process_index

    def said(function):
        try:
            function()
        except PrepareError as error:
            return str(error)
        return "not at all"

    def forward():
        x, _ = rows(me, 0)
        run.backward(net(x, torch.linspace(0, 1, 8) * share(me, 0)).sum())

    batch = rows(me, 0)
    return {
        "function": said(lambda: run.backward(scaled_loss, net, batch, torch.tensor(share(me, 0)))),
        "model": said(forward),
        "alike": said(lambda: run.backward(scaled_loss, net, batch, torch.tensor(2.0))),
    }


def trained(partitioning, loss_of, steps=1):
    """What the processes are told, and in which step, when they train on this loss."""
    run = accelerator(partitioning)
    net = model()
    net, optimizer = run.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(steps):
        try:
            loss_of(run, net, run.process_index, step)
        except PrepareError as error:
            return [step, str(error)]
        optimizer.step()
        optimizer.zero_grad()
    return [steps, "nothing"]


def exponents(run, net, process, step):
    x, y = rows(process, step)
    loss = functional.cross_entropy(net(x).view(-1, 5), y.reshape(-1))
    run.backward(loss + net.first.weight.abs().pow(2 + process).sum())


def options(run, net, process, step):
    x, y = rows(process, step)
    dropped = functional.dropout(net(x), p=0.25 * (1 + process))
    run.backward(functional.cross_entropy(dropped.view(-1, 5), y.reshape(-1)))


def looks(run, net, process, step):
    """Process 0 looks at more, for its log, and every process has its own bounds, and exponents as tensors."""
    x, y = rows(process, step)
    out = net(x).view(-1, 5)
    seen = (out.detach() ** 3).mean() if process == 0 else None
    decay = net.first.weight.abs().pow(torch.tensor(2.0 + process)).sum()
    run.backward(functional.cross_entropy(out.clamp(max=3 + process), y.reshape(-1)) + decay)
    del seen


def late(run, net, process, step):
    run.backward(scaled_loss, net, rows(process, step), torch.tensor(2.0 + (process if step == 4 else 0)))


def main():
    torch.set_num_threads(1)
    held = accelerator("auto")  # the job ends with the last Accelerator
    result = {name: loop(name) for name in ("pmap", "sharding")}
    result |= {f"refused {name}": refused(name) for name in ("pmap", "sharding")}
    result["exponents"] = trained("pmap", exponents)
    result["options"] = trained("sharding", options)
    result["looks"] = trained("sharding", looks, 2)
    result["late"] = trained("sharding", late, 9)
    leave(held, result)


if __name__ == "__main__":
    run_job(main)
