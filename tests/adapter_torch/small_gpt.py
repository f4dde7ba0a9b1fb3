"""A small GPT in the usual shape, and its data, for tests of meshes."""

from __future__ import annotations

import torch
from torch import nn

from polyaccel import Accelerator

VOCABULARY, WIDTH, HEADS, LENGTH, SAMPLES, BATCH = 64, 32, 4, 16, 80, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attention, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight  # tied, as usual
        self.odd = nn.Parameter(torch.zeros(3, 5))  # divides by nothing
        self.register_buffer("order", torch.arange(LENGTH), persistent=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(self.order)
        x = x + nn.functional.pad(self.odd.flatten(), (0, WIDTH - self.odd.numel()))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(seed: int) -> Gpt:
    torch.manual_seed(seed)
    return Gpt()


def loss_fn(model, batch):
    logits = model(batch[:, :-1] if batch.shape[1] > LENGTH else batch)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def loader():
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(tokens, batch_size=BATCH)


def accelerator(**settings) -> Accelerator:
    """Batches of a loader are the global ones, so that the same script sees the same on every mesh."""
    return Accelerator(backend="torch", cpu=True, split_batches=True, **settings)


def train(run: Accelerator, model, optimizer, batches, num_steps: int, max_norm: float = 0.5):
    """(losses, norms of the gradients) of so many batches."""
    losses, norms = [], []
    while len(losses) < num_steps:
        for batch in batches:
            with run.accumulate(model):
                loss = run.backward(loss_fn, model, batch)
                if run.sync_gradients:
                    norms.append(float(run.clip_grad_norm_(model.parameters(), max_norm)))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
            if len(losses) == num_steps:
                break
    return losses, norms
