"""Small models, data and the hand-written torch loop that the xla engine is compared with, in one process."""

import contextlib
import copy
import math

import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator

torch.set_num_threads(1)


class MLP(nn.Sequential):
    """(batch, 8) -> (batch, 3)."""

    def __init__(self, width=16):
        super().__init__(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))


class CNN(nn.Module):
    """(batch, 1, 8, 8) -> (batch, 3), with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)  # (batch, 4, 4, 4)
        return self.head(x.flatten(1))


class GPT(nn.Module):
    """(batch, seq) tokens -> (batch, seq, vocab) logits; tied embedding."""

    def __init__(self, vocab=40, width=16, heads=2, blocks=1, length=12, dropout=0.0):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        x = self.token(tokens) + self.position[: tokens.shape[1]]  # (batch, seq, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        batch, seq, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (batch, heads, seq, width / heads) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, seq, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def classification_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def language_loss(model, batch):
    (tokens,) = batch
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def vectors(rows=48):
    """(rows, 8) inputs, (rows,) classes."""
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 8, generator=g), torch.randint(0, 3, (rows,), generator=g))


def images(rows=48):
    """(rows, 1, 8, 8) inputs, (rows,) classes."""
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 1, 8, 8, generator=g), torch.randint(0, 3, (rows,), generator=g))


def text(rows=48):
    """(rows, 13) tokens that follow a rule, so that there is something to learn."""
    g = torch.Generator().manual_seed(1)
    start = torch.randint(0, 40, (rows, 1), generator=g)
    return TensorDataset((start + torch.arange(13) * 3) % 40)


CASES = {
    "mlp": (MLP, vectors, classification_loss),
    "cnn with batch norm": (CNN, images, classification_loss),
    "gpt": (GPT, text, language_loss),
}


def warmup_cosine(optimizer, warmup=5, total=40):
    """A rate of exactly 0 at the first step, and again at the last."""

    def factor(step):
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def torch_losses(
    model, data, loss_fn, *, epochs, batch=16, optimizer=adamw, scheduler=None, accumulate=1, max_norm=None, bf16=False
):
    """Losses of the hand-written loop on the host, and the trained copy."""
    model = copy.deepcopy(model)
    optimizer = optimizer(model.parameters())
    scheduler = scheduler and scheduler(optimizer)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    losses = []
    for _ in range(epochs):
        for index, rows in enumerate(DataLoader(data, batch_size=batch)):
            with autocast:
                loss = loss_fn(model, rows)
            (loss / accumulate).backward()
            losses.append(loss.item())
            if (index + 1) % accumulate == 0 or (index + 1) * batch >= len(data):
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return losses, model


def xla_losses(
    model,
    data,
    loss_fn,
    *,
    epochs,
    batch=16,
    optimizer=adamw,
    scheduler=None,
    accumulate=1,
    max_norm=None,
    form="value",
    **arguments,
):
    """Losses of the same loop through an Accelerator on four virtual devices, and the accelerator and trained copy."""
    accelerator = Accelerator(backend="xla", split_batches=True, gradient_accumulation_steps=accumulate, **arguments)
    model = copy.deepcopy(model)
    optimizer = optimizer(model.parameters())
    schedule = (scheduler(optimizer),) if scheduler is not None else ()
    prepared = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=batch), *schedule)
    model, optimizer, loader = prepared[:3]
    scheduler = prepared[3] if schedule else None
    step = accelerator.train_step(loss_fn, model, optimizer, scheduler, max_norm) if form == "train_step" else None
    losses = []
    for _ in range(epochs):
        for rows in loader:
            if step is not None:
                losses.append(step(rows).item())
                continue
            with accelerator.accumulate(model):
                if form == "function":
                    loss = accelerator.backward(loss_fn, model, rows)
                else:
                    loss = loss_fn(model, rows)
                    accelerator.backward(loss)
                if accelerator.sync_gradients and max_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses, accelerator.unwrap_model(model), accelerator


def compiles():
    """Graphs compiled by this process so far, from the metrics report."""
    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


def executions():
    """Graphs run by this process so far."""
    xm.wait_device_ops()  # a run is counted when it ends
    data = metrics.metric_data("ExecuteReplicatedTime")
    return data[0] if data else 0
