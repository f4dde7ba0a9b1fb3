"""A training that is saved after some updates and continued by another call, process or engine. Run as a script it takes the arguments
of `train` as JSON and prints what it gives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator, set_seed

NUM_SAMPLES, BATCH, WORDS, LENGTH = 56, 8, 12, 5  # 7 global batches in a pass
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


class Net(nn.Module):
    """Tied weights, a frozen parameter, a buffer that is saved and one that is not; dropout on demand."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 16)
        self.inner.bias.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.full((), 0.5))
        self.register_buffer("place", torch.linspace(0, 1, LENGTH)[:, None], persistent=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.words(words) + self.place
        hidden = hidden + self.dropout(torch.tanh(self.inner(self.norm(hidden)))) * self.scale
        return self.head(hidden)


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    words, following = batch
    return F.cross_entropy(model(words).flatten(0, 1), following.flatten())


def prepared(
    backend: str,
    folder: str | None,
    *,
    optimizer: str = "AdamW",
    dropout: float = 0.0,
    accumulate: int = 1,
    workers: int = 0,
    seed: int = 0,
    **settings: Any,
) -> tuple[Any, ...]:
    """(accelerator, model, optimizer, loader, scheduler) of a script; every global batch has BATCH samples on any mesh."""
    torch.set_num_threads(1)
    set_seed(seed)
    accelerator = Accelerator(
        backend=backend,
        cpu=True,
        project_dir=folder,
        gradient_accumulation_steps=accumulate,
        split_batches=True,
        step_scheduler_with_optimizer=False,
        **settings,
    )
    made = torch.Generator().manual_seed(1)
    words = torch.randint(0, WORDS, (NUM_SAMPLES, LENGTH), generator=made)
    model = Net(dropout)
    own = OPTIMIZERS[optimizer](p for p in model.parameters() if p.requires_grad)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(own, T_0=9, eta_min=1e-5)
    loader = DataLoader(TensorDataset(words, words.roll(1, 1)), batch_size=BATCH, shuffle=True, num_workers=workers)
    return accelerator, *accelerator.prepare(model, own, loader, scheduler)


def train(
    backend: str,
    folder: str | None = None,
    *,
    num_batches: int,
    save_at: int | None = None,
    load: str | bool = False,
    fused: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train until `num_batches` batches were used in all; losses of this call's batches, weights at the end, the checkpoint's folder."""
    accelerator, model, optimizer, loader, scheduler = prepared(backend, folder, **options)
    path = None
    if load:
        path = accelerator.load_state(None if load is True else load)
    step = accelerator.train_step(loss_fn, model, optimizer) if fused else None
    done = loader.epoch * len(loader) + loader.state.batch
    losses: list[float] = []
    while done < num_batches:
        for batch in loader:
            if step is not None:
                losses.append(step(batch).item())
                if accelerator.sync_gradients:
                    scheduler.step()
            else:
                with accelerator.accumulate(model):
                    losses.append(float(accelerator.backward(loss_fn, model, batch)))
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    if accelerator.sync_gradients:
                        scheduler.step()
                    optimizer.zero_grad()
            done += 1
            if done == save_at:
                path = accelerator.save_state()
            if done == num_batches:
                break
    weights = {name: value.detach().double().tolist() for name, value in accelerator.get_state_dict(model).items()}
    accelerator.end_training()
    return {"losses": losses, "weights": weights, "path": path}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    result = train(**arguments)
    if arguments.get("is_quiet"):
        return
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
