"""Run in each process of a four-process gloo job by test_torch_sequences.py: models whose sequences lie in parts, answers as JSON.

Nothing is judged here. Every function is called on all processes, in this order; without a job, each is asked of one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mesh_job import local_bytes, started
from small_gpt import LENGTH, VOCABULARY, accelerator, gpt, loss_fn, train
from torch import nn
from torch.nn import functional as F

from polyaccel.errors import PolyaccelError

MESHES = {
    "fsdp 2 x sequence 2": {"data": 1, "fsdp": 2, "sequence": 2},
    "tensor 2 x sequence 2": {"data": 1, "tensor": 2, "sequence": 2},
    "sequence 4": {"data": 1, "sequence": 4},
}
WIDTH, HEADS, LABEL_OF_NOTHING = 16, 4, -100


def trained(settings, folder):
    run, model, optimizer, batches = started(settings, seed=0)
    seen: list[
        int
    ] = []  # of a sample: what a layer gives whose outputs `tensor` cuts, and what the block around it does
    for part in (model.blocks[0].mlp.fc1, model.blocks[0].mlp):
        part.register_forward_hook(lambda part, inputs, out: seen.append(local_bytes([out]) // len(out)))
    losses, norms = train(run, model, optimizer, batches, 4)
    return {
        "losses": losses,
        "norms": norms,
        "bytes inside": seen[:2],
        "parameters": local_bytes(model.parameters()),
    }


def accumulated(settings, folder):
    run, model, optimizer, batches = started({**settings, "gradient_accumulation_steps": 2}, seed=0)
    return train(run, model, optimizer, batches, 4)


def weighted(settings, folder):
    """Every token counts once, however many each batch has."""
    run, model, optimizer, batches = started({**settings, "gradient_accumulation_steps": 2}, seed=0)
    losses = []
    for step, batch in zip(range(4), batches, strict=False):
        count = batch.shape[0] // (1 + step % 2)
        with run.accumulate(model):
            losses.append(float(run.backward(loss_fn, model, batch[:count], weight=count)))
            optimizer.step()
            optimizer.zero_grad()
    return losses


def resumed(settings, folder):
    """Three steps with sequences in parts, and two without."""
    run, model, optimizer, batches = started(settings, seed=0)
    losses, _ = train(run, model, optimizer, batches, 3)
    run.save_state(folder / "state", blocking=True)
    run, model, optimizer, batches = started({"mesh": {"fsdp": -1}} if settings else {}, seed=5)
    run.load_state(folder / "state")
    more, _ = train(run, model, optimizer, batches, 2)
    return losses + more


def heads(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def attend(part, x, **options):
    return F.scaled_dot_product_attention(heads(part(x)), heads(x), heads(x * 2), **options).transpose(1, 2).flatten(2)


def by_hand(part, x):
    scores = heads(part(x)) @ heads(x).transpose(2, 3)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(3) @ heads(x)).transpose(1, 2).flatten(2)


def labels_of(tokens):
    """What is ignored lies in the second half of each sequence alone: parts have different numbers of labels."""
    return torch.where(torch.arange(tokens.shape[1]) < 9, tokens % WIDTH, LABEL_OF_NOTHING)


def shifted(tokens):
    moved = tokens.new_zeros(tokens.shape)
    moved[:, 1:] = tokens[:, :-1].clone()
    moved[moved == 3] = 4
    return moved


MASK = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)).gt(0.3) | torch.eye(LENGTH).bool()
# What a model may do with its sequences. `part` is a Linear of its own, x (batch, length, width), tokens (batch, length).
OPERATIONS = {
    "attention": lambda part, x, tokens: attend(part, x),
    "causal attention": lambda part, x, tokens: attend(part, x, is_causal=True),
    "masked attention": lambda part, x, tokens: attend(part, x, attn_mask=MASK),
    "padded attention": lambda part, x, tokens: attend(part, x, attn_mask=(tokens > 5)[:, None, None]),
    "grouped attention": lambda part, x, tokens: F.scaled_dot_product_attention(
        heads(part(x)), heads(x)[:, :2], heads(x)[:, 2:], is_causal=True, enable_gqa=True
    ),
    "attention by hand": lambda part, x, tokens: by_hand(part, x),
    "attention to others": lambda part, x, tokens: F.scaled_dot_product_attention(
        heads(part(x)), heads(x)[:, :, :3], heads(x)[:, :, 3:6], is_causal=True
    ),
    "positions": lambda part, x, tokens: part(x) * torch.arange(x.shape[1])[:, None],
    "positions of what is there": lambda part, x, tokens: part(x) * (tokens > 5).cumsum(1)[..., None],
    "rotary": lambda part, x, tokens: (
        torch.cat([-part(x)[..., 8:], x[..., :8]], -1) * torch.arange(LENGTH)[:, None].sin()
    ),
    "a token before": lambda part, x, tokens: torch.cat([torch.zeros(len(x), 1, WIDTH), part(x)[:, :-1]], 1),
    "the last token": lambda part, x, tokens: part(x)[:, -1],
    "the end": lambda part, x, tokens: part(x)[torch.arange(len(x)), tokens.argmax(1)],
    "mean": lambda part, x, tokens: part(x)[:, 1:].mean(1),
    "sum so far": lambda part, x, tokens: part(x).cumsum(1),
    "state": lambda part, x, tokens: torch.stack([part(one) for one in x.unbind(1)], 1),
    "convolution": lambda part, x, tokens: F.conv1d(part(x).transpose(1, 2), part.weight[:, :, None].expand(-1, -1, 3)),
    "pairs": lambda part, x, tokens: part(x).reshape(len(x), LENGTH // 2, 2, WIDTH).sum(2),
    "two runs of tokens": lambda part, x, tokens: part(x).reshape(len(x), 2, LENGTH // 2, WIDTH).sum(1),
    "rows": lambda part, x, tokens: part(x.flatten(0, 1))[::3],
    "a value": lambda part, x, tokens: part(x) * float(x.detach().sum()),
    "a branch": lambda part, x, tokens: part(x) if bool((tokens[:, -1] > 60).any()) else x,
    "written tokens": lambda part, x, tokens: part(x) * shifted(tokens)[..., None],
    "a loss that leaves some out": lambda part, x, tokens: F.cross_entropy(
        part(x).flatten(0, 1), labels_of(tokens).flatten()
    ),
    "a loss of the next": lambda part, x, tokens: F.cross_entropy(
        part(x)[:, :-1].transpose(1, 2), labels_of(tokens)[:, 1:]
    ),
    "a sum of losses": lambda part, x, tokens: F.cross_entropy(
        part(x).view(-1, WIDTH), labels_of(tokens).view(-1), reduction="sum"
    ),
    "a product and a matrix": lambda part, x, tokens: torch.addmm(
        x.flatten(0, 1), part(x).flatten(0, 1), part.weight, beta=0.5, alpha=2
    ),
    "a product over tokens": lambda part, x, tokens: torch.addmm(
        part.bias, x.transpose(1, 2).flatten(0, 1), part(x)[0], beta=0.5, alpha=2
    ),
    "squares": lambda part, x, tokens: F.mse_loss(part(x), x),
    "huber": lambda part, x, tokens: F.huber_loss(part(x), x),
    "bernoulli": lambda part, x, tokens: F.binary_cross_entropy(part(x).sigmoid(), x.sigmoid()),
    "batch norm": lambda part, x, tokens: F.batch_norm(part(x).transpose(1, 2), None, None, training=True),
}


class Operation(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(1)
        self.part, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x, tokens):
        return self.function(self.part, x, tokens)


def operations(settings, folder):
    """Result, and gradients of inputs and of a weight: of each the sums along two directions."""
    run = accelerator(**settings)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, LENGTH, WIDTH, generator=generator)
    tokens = torch.randint(VOCABULARY, (4, LENGTH), generator=generator)
    found = {}
    for name, function in OPERATIONS.items():
        model = run.prepare(Operation(function))
        given = x.clone().requires_grad_()
        out = model(given, tokens)
        run.backward((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum())
        run.clip_grad_norm_(model.parameters(), 1e9)  # from here on, gradients lie as parameters do
        grads = [given.grad] + [p.grad for p in model.parameters() if p.grad is not None]
        grads = [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads if grad is not None]
        found[name] = [
            [float(one.double().sum()), float((one.double().flatten() * torch.arange(one.numel())).sum())]
            for one in (out.detach(), *grads)
        ]
    return found


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.table = nn.Linear(8, 8), nn.Parameter(torch.ones(64, 8))

    def forward(self, x):  # (batch, 64, 8)
        return F.dropout(self.part(x) * 0 + 1, 0.5), F.dropout(self.table, 0.5), torch.rand(4)


def noise(settings, folder):
    """What dropout kept of a sequence and of what has none, and what was drawn whole; each process was seeded in its own way."""
    run = accelerator(**settings)
    torch.manual_seed(run.process_index)
    return [one.detach().ne(0).int().tolist() for one in run.prepare(Noisy())(torch.ones(1, 64, 8))[:2]]


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(8, 8)

    def forward(self, x):
        y = self.part(x)
        y[:, 1:3].mul_(2)
        return y


class WritesIntoASum(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.part, self.write = nn.Linear(8, 8), write

    def forward(self, x):
        return self.write(self.part(x).sum(1).detach())


def refused(settings, folder):
    said = []
    run = accelerator(**settings)
    model = run.prepare(gpt(0))
    calls = (
        lambda: model(torch.zeros(2, LENGTH - 1, dtype=torch.long)),
        lambda: model(torch.zeros((), dtype=torch.long)),
        lambda: run.prepare(Writes())(torch.ones(2, LENGTH, 8)),
        lambda: run.prepare(WritesIntoASum(torch.Tensor.uniform_))(torch.ones(2, LENGTH, 8)),
        lambda: run.prepare(WritesIntoASum(lambda y: y.fill_(torch.ones(()))))(torch.ones(2, LENGTH, 8)),
        lambda: accelerator(**settings, compile=True),
    )
    for call in calls:
        try:
            call()
        except PolyaccelError as error:
            said.append(error.message)
    model.eval()
    with torch.no_grad():
        whole = model(torch.arange(LENGTH)[None]).double().sum()
    return [*said, float(whole)]


def evaluated_at_any_length(settings, folder):
    run = accelerator(**settings)
    model = run.prepare(Operation(OPERATIONS["causal attention"])).eval()
    with torch.no_grad():
        return float(model(torch.ones(2, 7, WIDTH).cumsum(1), torch.zeros(2, 7, dtype=torch.long)).double().sum())


DATA_SEQUENCE = {"data": 2, "sequence": 2}
QUESTIONS = {
    **{f"trained, {name}": (trained, mesh) for name, mesh in MESHES.items()},
    "accumulated": (accumulated, DATA_SEQUENCE),
    "weighted": (weighted, MESHES["sequence 4"]),
    "resumed": (resumed, DATA_SEQUENCE),
    "operations": (operations, DATA_SEQUENCE),
    "noise": (noise, MESHES["sequence 4"]),
    "refused": (refused, MESHES["sequence 4"]),
    "any length": (evaluated_at_any_length, MESHES["sequence 4"]),
}


def main(folder: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    answers = {}
    for number, (name, (ask, mesh)) in enumerate(QUESTIONS.items()):
        if any(part in name for part in only.split(",")):
            answers[name] = ask({"mesh": mesh}, folder / str(number))
    rank = accelerator().process_index
    (folder / f"{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
