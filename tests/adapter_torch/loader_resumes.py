"""Interrupted epochs, continued: what every loader gives after `load_state`, beside what it gave in the run that went on.

Imported by test_torch_loader_resume.py for one process, and run by it as a job of several.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

from polyaccel import Accelerator, DataLoaderConfiguration

SIZE, BATCH, SAVED_AFTER = 22, 2, 2
MAPS = [
    {"shuffle": shuffle, "workers": workers, "seedable": seedable, "stateful": stateful, "data": "map"}
    for shuffle, workers, seedable, stateful in itertools.product((False, True), (0, 2), (False, True), (False, True))
]
OTHERS = [
    {"shuffle": True, "workers": 0, "seedable": False, "stateful": False, "data": "map", "generator": True},
    {"shuffle": True, "workers": 0, "seedable": False, "stateful": True, "data": "map", "generator": True},
    {"shuffle": True, "workers": 0, "seedable": False, "stateful": False, "data": "map", "dispatch": True},
    {"shuffle": True, "workers": 0, "seedable": True, "stateful": True, "data": "map", "dispatch": True},
    {"shuffle": False, "workers": 0, "seedable": False, "stateful": False, "data": "stream"},
    {"shuffle": False, "workers": 0, "seedable": False, "stateful": True, "data": "stream"},
    {"shuffle": False, "workers": 0, "seedable": False, "stateful": True, "data": "stream", "dispatch": False},
    {"shuffle": False, "workers": 0, "seedable": False, "stateful": True, "data": "knowing stream"},
    {"shuffle": False, "workers": 0, "seedable": False, "stateful": False, "data": "knowing iterable"},
]
CASES = [*MAPS, *OTHERS]


class Stream(IterableDataset):
    """Other samples in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(range(100 * self.epoch, 100 * self.epoch + SIZE))


class KnowingStream(Stream):
    """Says itself where it stands, and cannot be skipped: what was read is read again only from its own state."""

    position = 0
    first = 0

    def __iter__(self):
        self.position, self.first = self.first, 0
        while self.position < SIZE:
            self.position += 1
            yield 100 * self.epoch + self.position - 1

    def state_dict(self):
        return {"position": self.position, "as a tensor": torch.tensor([self.position])}

    def load_state_dict(self, state):
        assert state["as a tensor"].item() == state["position"]
        self.first = state["position"]


class KnowingIterable:
    """Whole batches, read once from a source that goes on by itself."""

    def __init__(self) -> None:
        self.position = 0
        self.num_read = 0

    def __iter__(self):
        for start in range(self.position, SIZE - 2, 2):
            self.position = start + 2
            self.num_read += 1
            yield torch.tensor([start, start + 1])
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def name(case: dict) -> str:
    return " ".join(key if value is True else f"{key}={value}" for key, value in case.items())


def open_loader(case: dict, seed: int, **options):
    """A new Accelerator and the loader of a case, as a new process of the job would make them."""
    torch.manual_seed(seed)
    config = DataLoaderConfiguration(
        use_seedable_sampler=case["seedable"],
        use_stateful_dataloader=case["stateful"],
        dispatch_batches=case.get("dispatch"),
    )
    run = Accelerator(cpu=True, dataloader_config=config, **options)
    kinds = {"map": lambda: list(range(SIZE)), "stream": Stream, "knowing stream": KnowingStream}
    if case["data"] == "knowing iterable":
        return run, run.prepare_data_loader(KnowingIterable())
    generator = torch.Generator().manual_seed(seed) if case.get("generator") else None
    loader = DataLoader(
        kinds[case["data"]](),
        batch_size=BATCH,
        shuffle=case["shuffle"] or None,
        num_workers=case["workers"],
        generator=generator,
    )
    return run, run.prepare(loader)


def one_pass(loader, after_batch=lambda number: None) -> list[list[int]]:
    read = []
    for number, batch in enumerate(loader):
        read.append(batch.tolist())
        torch.rand(())  # training draws from the generator that the order comes from
        after_batch(number)
    return read


def answer(case: dict, folder: Path, **options) -> dict:
    """{epoch it was saved in: (what was due, what came)}: the rest of that epoch, and all of the next one."""
    run, loader = open_loader(case, seed=5, **options)
    whole = []
    for epoch in range(3):
        path = str(folder / f"{epoch}")

        def save(number, path=path):
            if number == SAVED_AFTER - 1:
                run.save_state(path, blocking=True)

        whole.append(one_pass(loader, save if epoch < 2 else lambda number: None))
    found = {}
    for epoch in range(2):
        run, loader = open_loader(case, seed=77 + epoch, **options)
        run.load_state(str(folder / f"{epoch}"))
        due = [whole[epoch][SAVED_AFTER:], whole[epoch + 1]]
        found[f"epoch {epoch}"] = (due, [one_pass(loader), one_pass(loader)])
        assert loader.epoch == epoch + 2
    if case["shuffle"]:
        assert len({str(order) for order in whole}) == 3, "every epoch has its own order"
    return found


if __name__ == "__main__":
    target, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    answers = {}
    for index, case in enumerate(CASES):
        shared = target / f"{index}"
        shared.mkdir(exist_ok=True)
        answers[name(case)] = answer(case, shared, **options)
    process = Accelerator(cpu=True, **options).process_index
    (target / f"{process}.json").write_text(json.dumps(answers))
