"""One process of a job whose mesh cuts sequences; prints what test_jax_sequence_processes.py compares. Not a test itself."""

from __future__ import annotations

import jax
import optax
import torch
from answering import answer, run_job
from flax import nnx
from mesh_processes import MAX_NORM, SIZE, accelerator, gpt, tokens
from test_jax_tensor_axis import Gpt, next_token_loss, token_batches
from torch.utils.data import DataLoader, TensorDataset

FLAX_LENGTH = 32


def pairs(num_batches):
    """Tokens, and the ones that follow: both of the length that is cut."""
    data = tokens(num_batches)
    return TensorDataset(data[:, :-1].contiguous(), data[:, 1:].contiguous())


def loss_fn(model, batch):
    given, following = batch
    return torch.nn.functional.cross_entropy(model(given).flatten(0, 1), following.flatten())


def torch_gpt(mesh):
    """Three steps of a recorded loop and three fused ones; what each process was given and reads."""
    run = accelerator(mesh)
    model = gpt(run.process_index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = run.prepare(model, optimizer, DataLoader(pairs(6), batch_size=SIZE))
    step = run.train_step(loss_fn, model, optimizer, max_grad_norm=MAX_NORM)
    losses, norms, rows, shapes = [], [], [], []
    for number, batch in enumerate(loader):
        rows.append(batch[0][:, 0].tolist())
        if number >= 3:
            losses.append(step(batch))
            continue
        given, following = batch
        logits = model(given)
        shapes.append(list(logits.shape))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        run.backward(loss)
        losses.append(run.reduce(loss.detach(), "mean"))
        norms.append(run.clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(batch[0])
    seen = run.gather_for_metrics(logits.argmax(-1))
    state = run.get_state_dict(model)
    return {
        "losses": [float(loss) for loss in losses],
        "norms": [float(norm) for norm in norms],
        "rows": rows,
        "shapes": shapes,
        "logits": logits.numpy().ravel().astype(float).tolist(),
        "gathered": list(seen.shape),
        "state": {name: value.numpy().ravel().tolist() for name, value in state.items()},
        "feeds": [run.plan.num_data_shards, run.plan.num_processes_per_shard],
    }


def flax_gpt(mesh):
    run = accelerator(mesh)
    model, optimizer = run.prepare(Gpt(nnx.Rngs(run.process_index), length=FLAX_LENGTH), optax.adamw(1e-3))
    loader = run.prepare_data_loader(token_batches(4, FLAX_LENGTH))
    step = run.train_step(next_token_loss, model, optimizer, max_grad_norm=MAX_NORM)
    return {"losses": [float(step(batch)) for batch in loader]}


def main():
    torch.set_num_threads(1)
    answer(accelerator(None), globals(), jax.clear_caches)  # the job ends with the last Accelerator


if __name__ == "__main__":
    run_job(main)
