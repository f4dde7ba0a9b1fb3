"""Run in each process of a four-process gloo job by test_torch_meshes.py: training and states on every mesh, answers as JSON.

Nothing is judged here. Every function is called on all processes, in this order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from small_gpt import SAMPLES, VOCABULARY, Gpt, accelerator, gpt, loader, loss_fn, train
from torch import nn

from polyaccel import ShardingRule, set_seed
from polyaccel.errors import PolyaccelError
from polyaccel.utils import DistributedDataParallelKwargs

MESHES = {
    "fsdp 4": {"data": 1, "fsdp": 4},
    "fsdp 2 x tensor 2": {"data": 1, "fsdp": 2, "tensor": 2},
    "data 2 x fsdp 2": {"data": 2, "fsdp": 2},
    "data 2 x tensor 2": {"data": 2, "tensor": 2},
    "tensor 4": {"data": 1, "tensor": 4},
}


def local_bytes(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def started(settings, *, seed=None):
    """An accelerator, and a model and its optimizer, which was made before the model was cut. Process 0's values count."""
    run = accelerator(**settings)
    model = gpt(run.process_index if seed is None else seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return run, *run.prepare(model, optimizer, loader())


def twenty_steps(mesh, folder):
    run, model, optimizer, batches = started({"mesh": mesh})
    losses, norms = train(run, model, optimizer, batches, 20)
    state = [value for entries in optimizer.state.values() for value in entries.values() if value.dim()]
    whole = run.get_state_dict(model)
    run.save_model(model, folder / "weights")
    return {
        "losses": losses,
        "norms": norms,
        "bytes": [local_bytes(model.parameters()), local_bytes(state)],
        "values": {name: float(value.double().square().sum()) for name, value in whole.items()},
        "is a Gpt": isinstance(run.unwrap_model(model), Gpt),
    }


def accumulated(mesh, folder):
    run, model, optimizer, batches = started({"mesh": mesh, "gradient_accumulation_steps": 5})
    return dict(zip(("losses", "norms"), train(run, model, optimizer, batches, 10), strict=True))


def narrow(mesh, folder):
    run, model, optimizer, batches = started({"mesh": mesh, "mixed_precision": "bf16"})
    return dict(zip(("losses", "norms"), train(run, model, optimizer, batches, 6), strict=True))


def resumed(mesh, folder, other):
    """Ten steps, an epoch, saved, and ten more on another mesh from another start."""
    run, model, optimizer, batches = started({"mesh": mesh})
    losses, _ = train(run, model, optimizer, batches, 10)
    run.save_state(folder / "state", blocking=True)
    run, model, optimizer, batches = started({"mesh": other}, seed=5)
    run.load_state(folder / "state")
    more, _ = train(run, model, optimizer, batches, 10)
    return losses + more


def interrupted(mesh, folder, *others, **settings):
    """Losses and norms of six batches in windows of two; and of the last three from a checkpoint inside a window, there and on other
    meshes."""
    settings = {**settings, "gradient_accumulation_steps": 2}
    run, model, optimizer, batches = started({"mesh": mesh, **settings})

    def saved_after_three():
        for number, batch in enumerate(batches, 1):
            yield batch
            if number == 3:
                run.save_state(folder / "window", blocking=True)

    found = [train(run, model, optimizer, saved_after_three(), 6)]
    for other in (mesh, *others):
        run, *parts = started({"mesh": other, **settings}, seed=5)
        run.load_state(folder / "window")
        found.append(train(run, *parts, 3))
    return found


def interrupted_narrow(mesh, folder):
    """With parameters that lie whole on every process beside those that are cut."""
    rules = [ShardingRule("*.ln_1.*", None)]
    return interrupted(mesh, folder, mixed_precision="bf16", sharding_rules=rules)


def fused(mesh, folder):
    run, model, optimizer, batches = started({"mesh": mesh, "gradient_accumulation_steps": 5})
    step = run.train_step(loss_fn, model, optimizer, max_grad_norm=0.5)
    return [float(step(batch)) for batch in batches]


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def made_without_values(mesh, folder):
    run = accelerator(mesh=mesh)
    with torch.device("meta"):
        model = Late()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(3 + run.process_index)
    model, optimizer = run.prepare(model, optimizer)
    values = {name: value.clone() for name, value in run.get_state_dict(model).items()}
    for step in range(2):  # the second one begins with the first process's statistics
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(4 * step + run.process_index))
        run.backward(model(x).square().mean())
    optimizer.step()
    statistics = model.norm.running_mean.tolist()
    with torch.no_grad():
        model.eval()(x)
    return {
        "ranges": {
            name: [float(value.min()), float(value.max())]
            for name, value in values.items()
            if value.is_floating_point()
        },
        "before": statistics,
        "after": model.norm.running_mean.tolist(),
    }


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.fc2(self.fc1(x)))


def noise(mesh, folder):
    """Which numbers dropout kept on each process, though each was seeded in its own way; and after a seed for each process."""
    run = accelerator(mesh=mesh)
    torch.manual_seed(run.process_index)
    model = run.prepare(Noisy())
    found = [run.gather(model(torch.ones(4, 8)))]
    set_seed(7, device_specific=True)
    found.append(run.gather(model(torch.ones(4, 8))))
    return [kept.ne(0).int().reshape(4, -1).tolist() for kept in found]


def metrics(mesh, folder):
    """Every sample once, and integers counted once, where several processes have the same batches."""
    run = accelerator(mesh=mesh)
    batches = run.prepare(torch.utils.data.DataLoader(torch.arange(SAMPLES // 8 + 1), batch_size=4))
    return [number for batch in batches for number in run.gather_for_metrics(batch).tolist()]


def refused(mesh, folder):
    said = []
    for settings in ({"kwargs_handlers": [DistributedDataParallelKwargs(bucket_cap_mb=5)]}, {}):
        try:
            run = accelerator(mesh=mesh, **settings)
            run.prepare(nn.Sequential(nn.Linear(3, VOCABULARY)))
        except PolyaccelError as error:
            said.append(error.message)
    return said


QUESTIONS = {
    **{f"twenty steps, {name}": (twenty_steps, mesh) for name, mesh in MESHES.items()},
    **{f"accumulated, {name}": (accumulated, MESHES[name]) for name in ("fsdp 2 x tensor 2", "data 2 x fsdp 2")},
    "fused": (fused, MESHES["data 2 x fsdp 2"]),
    "bf16": (narrow, MESHES["fsdp 4"]),
    "resumed": (resumed, MESHES["fsdp 2 x tensor 2"], MESHES["data 2 x fsdp 2"]),
    "resumed on tensor": (resumed, MESHES["fsdp 4"], MESHES["data 2 x tensor 2"]),
    "interrupted": (interrupted, MESHES["fsdp 2 x tensor 2"], MESHES["data 2 x fsdp 2"], MESHES["tensor 4"]),
    "interrupted, bf16": (interrupted_narrow, MESHES["fsdp 4"]),
    "late": (made_without_values, MESHES["data 2 x fsdp 2"]),
    "noise": (noise, MESHES["fsdp 2 x tensor 2"]),
    "metrics": (metrics, MESHES["fsdp 2 x tensor 2"]),
    "refused": (refused, MESHES["data 2 x tensor 2"]),
}


def main(folder: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    answers = {}
    for number, (name, (ask, mesh, *more)) in enumerate(QUESTIONS.items()):
        if any(part in name for part in only.split(",")):
            answers[name] = ask(mesh, folder / str(number), *more)
    rank = accelerator().process_index
    (folder / f"{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
