"""A GPT whose parameters and layers are shared by several devices. The script names no mesh: the configuration does.

    polyaccel launch --backend torch --cpu --num-processes 4 --mesh.fsdp 2 --mesh.tensor 2 examples/mesh_gpt.py
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu --mesh.fsdp 2 --mesh.tensor 2 examples/mesh_gpt.py
    CPU_NUM_DEVICES=4 PJRT_DEVICE=CPU polyaccel launch --backend xla --mesh.data 4 examples/mesh_gpt.py     # in the xla environment
    polyaccel plan examples/mesh_gpt.py --topology cpu:4 --mesh.fsdp 2 --mesh.tensor 2                      # what it will need
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu --mesh.fsdp 4 examples/mesh_gpt.py --project gpt --save-every 20
    JAX_NUM_CPU_DEVICES=4 polyaccel launch --backend jax --cpu --mesh.data 2 --mesh.tensor 2 examples/mesh_gpt.py --project gpt --resume

The losses are the same on every mesh. Layers have the names that tensor parallelism knows (q_proj, o_proj, ...): other names would want a
ShardingRule each (docs/meshes.md). Data: `pydoc_data.topics`, the English text that every Python carries.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from curves import Curve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator, set_seed

GLOBAL_BATCH, CONTEXT = 8, 64


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):  # (batch, time, width)
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, time, head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers=4, heads=4, width=128):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids):  # (batch, time) -> (batch, time, 256)
        x = self.embed_tokens(ids) + self.embed_positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def windows():
    """Bytes and the bytes that follow them, in windows of CONTEXT."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    count = (len(data) - 1) // CONTEXT * CONTEXT
    return TensorDataset(data[:count].view(-1, CONTEXT), data[1 : count + 1].view(-1, CONTEXT))


def next_byte_loss(model, batch):
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="torch, xla or jax (default: what the launcher started, else torch)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--project", help="folder of checkpoints")
    parser.add_argument("--save-every", type=int, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, which any mesh has written"
    )
    parser.add_argument("--curve", help="write losses and speed to this JSON file")
    args = parser.parse_args()

    # split_batches: batch_size is the global batch, which is the same on any mesh.
    accelerator = Accelerator(backend=args.backend, split_batches=True, project_dir=args.project)
    set_seed(0)
    loader = DataLoader(windows(), batch_size=GLOBAL_BATCH, shuffle=True, drop_last=True)
    # Its parameters are made in parts, where the engine can: no process ever holds the whole model.
    model = accelerator.create_model(lambda: GPT(layers=args.layers, width=args.width))
    model = accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1))
    loader = accelerator.prepare(loader)
    if args.resume:
        accelerator.print("continuing from", accelerator.load_state())
    accelerator.print(accelerator)

    curve = Curve(args.curve, task="GPT on a mesh", backend=accelerator.backend, devices=accelerator.num_data_shards)
    model.train()
    for step, batch in zip(range(args.steps), loader, strict=False):
        loss = accelerator.backward(next_byte_loss, model, batch)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss)
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {float(loss):.4f}")
        if args.save_every and (step + 1) % args.save_every == 0:
            accelerator.save_state()
    curve.stop()
    accelerator.print(f"final loss {float(curve.losses[-1]):.4f}")
    if accelerator.is_main_process:
        curve.save()
    accelerator.end_training()


if __name__ == "__main__":
    main()
