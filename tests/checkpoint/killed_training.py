"""A training that is killed and goes on: everything that a resume must bring back, in one script. Not a test itself.

`python killed_training.py FLAVOUR` imports the frameworks once; every line of its input, a JSON object of arguments of `train`, is trained
in a forked child, whose process id and then exit status it prints.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from polyaccel import Accelerator
from polyaccel.checkpoint import newest_checkpoint
from polyaccel.config.project import ProjectConfiguration
from polyaccel.utils import set_seed

FLAVOURS = {  # engine, precision
    "torch": ("torch", "fp16"),
    "torch-on-jax": ("jax", "fp16"),
    "flax": ("jax", "fp16"),
    "xla": ("xla", "bf16"),
}
_TORCH = ("torch", "torch._dynamo", "torch.utils.data")
IMPORTS = {  # what takes seconds to import, and starts no thread and opens no device
    "torch": (*_TORCH, "polyaccel_torch.engine"),
    "torch-on-jax": (
        *_TORCH,
        "polyaccel_jax.engine",
        "polyaccel_bridges.torch_to_jax",
        "torch.fx.experimental.proxy_tensor",
    ),
    "flax": ("flax.nnx", "optax", "polyaccel_jax.engine"),
    "xla": (*_TORCH, "torch_xla"),
}
SAMPLES, BATCH, FEATURES = 256, 8, 16
X = np.random.default_rng(0).standard_normal((SAMPLES, FEATURES)).astype(np.float32)
Y = (X @ np.random.default_rng(1).standard_normal((FEATURES, 4))).argmax(1)


class Progress:
    """The script's own counter, registered for checkpointing."""

    def __init__(self):
        self.num_batches = 0

    def state_dict(self):
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state):
        self.num_batches = state["num_batches"]


def torch_objects():
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, num_workers=1)
    return model, optimizer, loader, scheduler


def torch_step(accelerator, model, optimizer, scheduler):
    from torch.nn.functional import cross_entropy

    def step(batch):
        x, y = batch
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.item()

    return step


class Shuffled:
    """Batches of numpy arrays in an order of the epoch, as a loader written by hand."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES // BATCH

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            rows = order[start : start + BATCH]
            yield {"x": X[rows], "y": Y[rows]}


def flax_objects():
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(FEATURES, 32, rngs=rngs)
            self.norm = nnx.BatchNorm(32, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    return Net(nnx.Rngs(0)), optax.adamw(optax.cosine_decay_schedule(1e-2, 500)), Shuffled()


def flax_step(accelerator, model, optimizer):
    import optax

    def loss_fn(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    step = accelerator.train_step(loss_fn, model, optimizer, max_grad_norm=1.0)
    return lambda batch: float(step(batch))


def state_hash(accelerator, *prepared):
    """One hash over every bit of the parameters, buffers and optimizer states."""
    digest = hashlib.sha256()
    for role, value in zip(("model", "optimizer"), prepared, strict=True):
        handle = accelerator._prepared.handle_of(value, role, argument=role)
        for shard in sorted(accelerator._engine.read_state(handle), key=lambda shard: (shard.name, shard.offset)):
            data = np.asarray(shard.data)
            digest.update(f"{shard.name} {shard.offset} {shard.dtype}".encode())
            digest.update(np.ascontiguousarray(data).view(np.uint8).tobytes() if data.size else b"")
    return digest.hexdigest()


def train(flavour, folder, *, num_batches, save_every, blocking_every=3, preemption="off", log="log", environment=None):
    """Train to `num_batches`, from the newest checkpoint in `folder` on, and note every loss in the file `log` there.

    Every line of the log is one write: "loss NUMBER BITS", "resumed PATH NUMBER", "acknowledged PATH" once a checkpoint is known to be
    complete, "end HASH NEXT_RANDOM_NUMBER".
    """
    warnings.simplefilter("ignore")
    engine, precision = FLAVOURS[flavour]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(environment or {})  # this process's place in a job
    log = os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(*words):
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    accelerator = Accelerator(
        backend=engine,
        mixed_precision=precision,
        gradient_accumulation_steps=2,
        cpu=True,
        preemption=preemption,
        project_config=ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=3),
    )
    set_seed(7)
    if flavour == "flax":
        model, optimizer, loader = flax_objects()
        model, optimizer = accelerator.prepare(model, optimizer)
        loader = accelerator.prepare_data_loader(loader)
        step = flax_step(accelerator, model, optimizer)
    else:
        model, optimizer, loader, scheduler = accelerator.prepare(*torch_objects())
        step = torch_step(accelerator, model, optimizer, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    found, _ = newest_checkpoint(folder / "checkpoints")
    if found is not None:
        accelerator.load_state()
        say("resumed", found.path, progress.num_batches)
    pending, num_saves = None, 0
    while progress.num_batches < num_batches:
        for batch in loader:
            value = step(batch)
            say("loss", progress.num_batches, float(value).hex())
            progress.num_batches += 1
            if progress.num_batches % save_every == 0:
                num_saves += 1
                is_blocking = num_saves % blocking_every == 0
                path = accelerator.save_state(blocking=is_blocking)
                for done in (pending, path if is_blocking else None):  # a save waits for the one before it
                    if done is not None:
                        say("acknowledged", done)
                pending = None if is_blocking else path
            if progress.num_batches == num_batches:
                break
    accelerator.wait_for_checkpoint()
    say("end", state_hash(accelerator, model, optimizer), np.random.random().hex())
    accelerator.end_training()


def serve(flavour):
    """Train once per line of the input, each time in a fork of this process, which has imported the frameworks and used none."""
    for module in IMPORTS[flavour]:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            os.dup2(2, 1)  # frameworks print, and the output belongs to the parent
            try:
                train(flavour, **json.loads(line))
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:  # noqa: BLE001 - a forked child may not run into the parent's loop
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(f"started {child}", flush=True)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
