"""Masked token losses over 4 micro batches with very different counts: one script for every engine and number of processes.

Run in each process of a two-process job by test_weighted_parity.py, which judges the answers; imported for engines of one process.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from polyaccel import Accelerator, LocalSGD

NUM_BATCHES, ROWS, LENGTH, VOCABULARY = 4, 8, 6, 11
_random = torch.Generator().manual_seed(3)
TOKENS = torch.randint(VOCABULARY, (NUM_BATCHES * ROWS, LENGTH), generator=_random)
LABELS = torch.randint(VOCABULARY, (NUM_BATCHES * ROWS, LENGTH), generator=_random)
# From nearly no token to nearly all, from row to row; every data shard and micro batch has another count, and one has none.
LABELS[torch.rand(LABELS.shape, generator=_random) > torch.linspace(0.05, 0.95, len(LABELS))[:, None]] = -100
LABELS[:4] = -100


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Embedding(VOCABULARY, 7), nn.Linear(7, VOCABULARY))


def token_loss(model, batch):
    """(mean over the tokens that have a label, their number); 0 / 0 in a batch without."""
    tokens, labels = batch
    logits = model(tokens)  # (rows, length, vocabulary)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, {"num_tokens": (labels != -100).sum()}


def batches(run):
    """This process's rows of each global micro batch."""
    share = ROWS // run.num_processes
    for start in range(0, len(TOKENS), ROWS):
        rows = slice(start + run.process_index * share, start + (run.process_index + 1) * share)
        yield TOKENS[rows].to(run.device), LABELS[rows].to(run.device)


def flat(values):
    return torch.cat([value.detach().cpu().flatten() for value in values]).tolist()


def trained(form, *, epochs=2, **options):
    """Gradients of the first window before and after the clip, and parameters after some windows; scalars that were exchanged."""
    run = Accelerator(cpu=True, gradient_accumulation_steps=NUM_BATCHES, **options)
    model = network()
    model, optimizer = run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    step = run.train_step(token_loss, model, optimizer, None, 0.1, weight="num_tokens")
    grads, norms, exchanged = [], [], []
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        exchanged.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted  # gradients do not come by here
    for _ in range(epochs):
        for batch in batches(run):
            if form == "train_step":
                step(batch)
                continue
            with run.accumulate(model):
                count = (batch[1] != -100).sum()
                if form == "name":
                    run.backward(token_loss, model, batch, weight="num_tokens")
                else:
                    run.backward(token_loss(model, batch)[0], weight=count if form == "device" else count.item())
                if run.sync_gradients:
                    if not grads:
                        grads = flat(p.grad for p in model.parameters())
                    norms.append(float(run.clip_grad_norm_(model.parameters(), 0.1)))
                optimizer.step()
                optimizer.zero_grad()
    dist.all_reduce = all_reduce
    return {"grads": grads, "norms": norms, "weights": flat(model.parameters()), "exchanged": exchanged}


def one_large_batch(epochs=2):
    """The same without accumulation, weights or data shards, in plain torch."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    grads, norms = [], []
    for _ in range(epochs):
        token_loss(model, (TOKENS, LABELS))[0].backward()
        grads = grads or flat(p.grad for p in model.parameters())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return {"grads": grads, "norms": norms, "weights": flat(model.parameters())}


def tail(mode):
    """Parameters after a window of 3 micro batches and one of 1."""
    run = Accelerator(cpu=True, gradient_accumulation_steps=3, tail_window=mode)
    model = network()
    loader = torch.utils.data.DataLoader(list(zip(TOKENS, LABELS, strict=True)), batch_size=ROWS // run.num_processes)
    model, optimizer, loader = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), loader)
    for tokens, _ in loader:
        with run.accumulate(model):
            run.backward(model(tokens).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model.parameters())


def local_sgd():
    """With weights inside LocalSGD every process divides by its own tokens: parameters after one update each, and their average."""
    run = Accelerator(cpu=True)
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    with LocalSGD(run, model, local_sgd_steps=10) as local:
        batch = list(batches(run))[-1]
        run.backward(token_loss(model, batch)[0], weight=(batch[1] != -100).sum())
        optimizer.step()
        optimizer.zero_grad()
        local.step()
        alone = flat(model.parameters())
    run.backward(token_loss(model, batch)[0], weight=1)  # exchanged again
    return {"alone": alone, "averaged": flat(model.parameters()), "restored": run.gradient_state.exchanges_weights}


def reduced():
    run = Accelerator(cpu=True)
    mine = torch.full((2,), 1.0 + run.process_index)
    return {how: run.reduce(mine, how, scale=0.5).tolist() for how in ("sum", "mean", "max", "min")}


def main(folder):
    answers = {form: trained(form) for form in ("number", "device", "name", "train_step")}
    run = Accelerator(cpu=True)
    if run.backend == "torch":
        answers |= {"full": tail("full"), "actual": tail("actual"), "local_sgd": local_sgd(), "reduced": reduced()}
    (Path(folder) / f"{run.process_index}.json").write_text(json.dumps(answers))
    run.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
