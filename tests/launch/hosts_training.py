"""A training as a user writes it, on any number of machines: `update loss` goes to the file that its first argument names.

Arguments: the file, the project folder, updates in all, updates between two checkpoints (0: none), seconds of pause per update.
Each process leaves its number and process id in `<file>.pids`.
"""

import os
import sys
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss

from polyaccel import Accelerator
from polyaccel.utils import set_seed

losses, project, updates, every, pause_s = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), float(sys.argv[5])

accelerator = Accelerator(project_dir=project)
with open(f"{losses}.pids", "a") as file:
    file.write(f"{accelerator.process_index} {os.getpid()}\n")
set_seed(3)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 12, 0.9)
x = torch.randn(64, 8)
rows = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(
    rows, batch_size=4, shuffle=True
)  # 16 batches: whole windows on 1, 2 or 4 data shards
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

if accelerator.has_checkpoint:
    accelerator.load_state()

update, window = int(scheduler.scheduler.last_epoch) // 4, []
while update < updates:
    for batch, target in loader:
        with accelerator.accumulate(model):
            loss = mse_loss(model(batch), target)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        window.append(accelerator.gather(loss.detach()).mean().item())
        if not accelerator.sync_gradients:
            continue
        update += 1
        if accelerator.is_main_process:
            with open(losses, "a") as file:
                file.write(f"{update} {(sum(window) / len(window)).hex()}\n")
        window.clear()
        time.sleep(pause_s)
        if every and update % every == 0:
            accelerator.save_state()
        if update == updates:
            break
accelerator.end_training()
if accelerator.is_main_process:
    with open(losses, "a") as file:
        file.write("end 0x0p+0\n")
