"""A byte-level GPT on CPython's own documentation, in PyTorch, with the fused step: `accelerator.train_step(...)`.

    polyaccel launch --backend torch examples/byte_gpt.py
    polyaccel launch --backend torch --num-processes 2 --cpu examples/byte_gpt.py        # DDP, same global batch
    polyaccel launch --backend jax examples/byte_gpt.py --mixed-precision bf16
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu examples/byte_gpt.py       # four virtual devices
    polyaccel launch --backend xla examples/byte_gpt.py                                   # in the xla environment
    polyaccel launch --backend torch examples/byte_gpt.py --project gpt --save-every 50   # and again with --resume, on any engine

Accumulation, clipping, warm-up and cosine decay; bf16 by flag. Data: `pydoc_data.topics`, about 465 KB of English that every Python
carries; the text differs between Python versions, so its sha256 is printed.
"""

import argparse
import hashlib
import math
from itertools import islice
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from curves import Curve
from torch import nn
from torch.utils.data import DataLoader, Dataset

from polyaccel import Accelerator, set_seed

GLOBAL_BATCH, CONTEXT = 8, 64


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (batch, heads, time, head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(batch, time, width)), self.dropout, self.training)
        return x + F.dropout(
            self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training
        )  # (batch, time, width)


class GPT(nn.Module):
    def __init__(self, layers=4, heads=4, width=128, dropout=0.0):
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(self._init)
        self.head.weight = self.token.weight  # tied

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))  # (batch, time, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (batch, time, 256)


class Windows(Dataset):
    """Windows of CONTEXT + 1 bytes, one after the other."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, index):
        return self.data[index * CONTEXT : (index + 1) * CONTEXT + 1].long()


class Progress:
    """How many updates were made; saved and continued with the rest."""

    updates = 0

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def next_byte_loss(model, window):
    logits = model(window[:, :-1])  # (batch, time, 256)
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="torch, xla or jax (default: what the launcher started, else torch)")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--updates", type=int, default=120, help="optimizer updates")
    parser.add_argument("--accumulate", type=int, default=2, help="micro batches per update")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--project", help="folder of checkpoints")
    parser.add_argument("--save-every", type=int, help="updates from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --project")
    parser.add_argument("--test-batches", type=int, help="held-out batches at the end (default: all), 0 for no test")
    parser.add_argument("--curve", help="write losses and speed to this JSON file")
    args = parser.parse_args()

    accelerator = Accelerator(
        backend=args.backend,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        split_batches=True,  # batch_size is the global batch, on any number of devices
        project_dir=args.project,
    )
    set_seed(args.seed)
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = len(data) * 9 // 10
    train_loader = DataLoader(Windows(data[:split]), batch_size=GLOBAL_BATCH, shuffle=True, drop_last=True)
    test_loader = DataLoader(Windows(data[split:]), batch_size=GLOBAL_BATCH, drop_last=True)
    model = GPT(dropout=args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, args.updates // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: (
            min(1, (update + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * min(1, update / args.updates)))
        ),
    )

    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )
    step = accelerator.train_step(next_byte_loss, model, optimizer, scheduler, max_grad_norm=1.0)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.print("continuing from", accelerator.load_state())
    accelerator.print(accelerator)
    accelerator.print(f"{len(text):,} bytes of text, sha256 {hashlib.sha256(text).hexdigest()[:16]}")

    curve = Curve(args.curve, task="byte GPT", backend=accelerator.backend, devices=accelerator.num_data_shards)
    model.train()
    per_update = GLOBAL_BATCH * args.accumulate
    left = args.updates - progress.updates
    if left <= 0:
        raise SystemExit(f"{progress.updates} updates were made already: ask for more with --updates")
    with accelerator.progress(total=left, description="updates", batch_size=per_update) as bar:
        while progress.updates < args.updates:
            for window in train_loader:
                loss = step(window)
                curve.add(loss)
                if accelerator.sync_gradients:
                    progress.updates += 1
                    bar.show(loss=loss)  # read in the background: no step waits for it
                    bar.update()
                    if args.save_every and progress.updates % args.save_every == 0:
                        accelerator.save_state()  # returns when everything is copied; written in the background
                if progress.updates == args.updates:
                    break
    curve.stop()

    model.eval()
    losses = []
    for window in islice(test_loader, args.test_batches):
        with torch.no_grad():
            losses.append(accelerator.reduce(next_byte_loss(model, window), "mean"))
    accelerator.print(f"final loss {float(curve.losses[-1]):.4f}")
    found = {"bits_per_byte": sum(float(loss) for loss in losses) / len(losses) / math.log(2)} if losses else {}
    if found:
        accelerator.print(f"{found['bits_per_byte']:.3f} bits per byte on held-out text")
    if accelerator.is_main_process:
        curve.save(**found)
    accelerator.end_training()


if __name__ == "__main__":
    main()
