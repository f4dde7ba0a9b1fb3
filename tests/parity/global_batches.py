"""Run on every engine by test_global_batches.py: the samples of each global batch of several loaders, and what metrics are told.

Each loader gives the numbers of its samples. Written as JSON by process 0: per loader, rows of [global batch, gathered for metrics].
"""

import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from polyaccel import Accelerator, skip_first_batches

Pair = namedtuple("Pair", "number text")


class Stream(IterableDataset):
    """Of a length that nobody knows."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))


def collate(numbers):
    return {"pair": Pair(torch.tensor(numbers), [f"sample {number}" for number in numbers])}


def rows(accelerator, loader, number=lambda batch: batch[0] if isinstance(batch, list) else batch):
    found = []
    for batch in loader:
        numbers = number(batch)
        everyone = accelerator.gather(numbers)
        real = accelerator.gather_for_metrics(numbers)
        found.append([everyone.tolist(), real.tolist()])
    return found


def torch_loaders():
    accelerator = Accelerator()
    accelerator.prepare(torch.nn.Linear(1, 1))  # this is a torch script
    assert accelerator.num_data_shards == 2
    numbers = TensorDataset(torch.arange(22))
    shuffled = {"shuffle": True, "generator": torch.Generator().manual_seed(5)}

    def prepared(data, batch_size=4, **options):
        return accelerator.prepare(DataLoader(data, batch_size=batch_size, **options))

    answers = {}
    loader = prepared(numbers, **shuffled)
    answers["shuffled"] = [rows(accelerator, loader) for _ in range(2)]  # passes
    answers["skipped"] = rows(accelerator, skip_first_batches(loader, 1))
    answers["dropped"] = rows(accelerator, prepared(numbers, drop_last=True))
    answers["whole"] = rows(accelerator, prepared(range(16)))
    answers["tiny"] = rows(accelerator, prepared(range(1), batch_size=3))
    answers["stream"] = rows(accelerator, prepared(Stream(19)))
    texts = prepared(range(11), batch_size=3, collate_fn=collate)
    answers["containers"] = [accelerator.gather_for_metrics(batch)["pair"] for batch in texts]
    answers["containers"] = [[pair.number.tolist(), pair.text] for pair in answers["containers"]]
    outer, inner = prepared(range(9), batch_size=2), prepared(range(5), batch_size=2)
    answers["nested"] = [
        [[accelerator.gather_for_metrics(b).tolist() for b in inner], rows_of(accelerator, batch)] for batch in outer
    ]
    lengths = [int(length) for length in accelerator.gather_for_metrics([len(text) for text in ["a", "bb"]])]
    answers["outside of loops"] = lengths if accelerator.num_processes == 2 else lengths * 2
    split = Accelerator(split_batches=True)
    split.prepare(torch.nn.Linear(1, 1))
    answers["split"] = rows(split, split.prepare(DataLoader(numbers, batch_size=4)))
    return answers


def rows_of(accelerator, batch):
    return accelerator.gather_for_metrics(batch).tolist()


def numpy_loaders():
    """The same data in a script without torch's loaders."""
    accelerator = Accelerator()
    batches = [{"number": np.arange(start, min(start + 4, 22))} for start in range(0, 22, 4)]
    loader = accelerator.prepare_data_loader(batches)
    answers = {"numpy": rows(accelerator, loader, lambda batch: batch["number"])}
    answers["numpy, skipped"] = rows(accelerator, skip_first_batches(loader, 2), lambda batch: batch["number"])
    return answers


if __name__ == "__main__":
    found = torch_loaders()
    if Accelerator().backend == "jax":
        found |= numpy_loaders()
    if Accelerator().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
