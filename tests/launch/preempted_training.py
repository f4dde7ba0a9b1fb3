"""A training as a user writes it, which a scheduler may interrupt: every loss goes to the file that its first argument names."""

import os
import sys
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from polyaccel import Accelerator
from polyaccel.utils import set_seed

accelerator = Accelerator(project_dir=sys.argv[2], gradient_accumulation_steps=2)
set_seed(3)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(64, 8)
rows = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, num_workers=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

if accelerator.has_checkpoint:
    accelerator.load_state()

for epoch in range(loader.state.epoch, 8):
    for batch, target in loader:
        with accelerator.accumulate(model):
            loss = mse_loss(model(batch), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.is_main_process:
            with open(sys.argv[1], "a") as losses:
                losses.write(f"{epoch} {loss.item().hex()}\n")
        time.sleep(float(os.environ.get("PAUSE_S", "0")))
if accelerator.is_main_process:
    with open(sys.argv[1], "a") as losses:
        losses.write("end\n")
accelerator.end_training()
