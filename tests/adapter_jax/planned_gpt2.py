"""GPT-2 as a torch script, which `polyaccel plan` runs: the model of handwritten_gpt2.py, its sizes as arguments."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from polyaccel import Accelerator

parser = argparse.ArgumentParser()
for name, default in {"layers": 12, "width": 768, "heads": 12, "vocab": 50257, "length": 1024, "batch": 4}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        width = args.width
        self.ln_1, self.attn, self.attn_out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln_2, self.mlp, self.mlp_out = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (args.heads, -1)).transpose(1, 2) for part in self.attn(self.ln_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(args.vocab, args.width), nn.Embedding(args.length, args.width)
        self.blocks = nn.ModuleList([Block() for _ in range(args.layers)])
        self.ln_f = nn.LayerNorm(args.width)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)  # one table for both


def loss_fn(model, batch):
    (tokens,) = batch
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


accelerator = Accelerator(mixed_precision="bf16")
model = Gpt2()
assert all(p.is_meta for p in model.parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.zeros(16 * args.batch, args.length, dtype=torch.int64)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=args.batch)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step = accelerator.train_step(loss_fn, model, optimizer)
for batch in loader:
    step(batch)
