"""How much of the time that reading takes is hidden behind the steps, per prefetch depth, with and without a thread that reads.

python benchmarks/prefetch.py --backend jax --output benchmarks/results/prefetch_jax.json

Reading a batch waits as for a disk (every fourth batch for the time of four, as where a file begins); a step keeps a simulated device busy
while the host goes on, so that other work of the machine counts little. The overlap is (reading alone + steps alone - both) / half of what
both alone take, measured in turn in one run: 0 where one waits for the other, 1 where one of them costs nothing. A loop that reads the
loss of every step waits for the device each time; one that does not runs ahead of it.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from interleaved import machine, save

from polyaccel import Accelerator, DataLoaderConfiguration

DEPTHS = (0, 1, 2, 4)
ROWS = 64


class SlowBatches:
    """Batches of numpy rows, of which every fourth takes the reading time of four."""

    def __init__(self, num_batches: int, read_s: float, width: int) -> None:
        self.num_batches, self.read_s = num_batches, read_s
        self.rows = np.random.default_rng(0).standard_normal((ROWS, width)).astype(np.float32)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for number in range(self.num_batches):
            if number % 4 == 0 and self.read_s:
                time.sleep(4 * self.read_s)
            yield {"x": self.rows}


class Device:
    """Does one step after the other, each in `step_s`, while the host goes on: what a GPU is to a loop."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.queue = step_s, ThreadPoolExecutor(1)

    def step(self, batch):
        return self.queue.submit(time.sleep, self.step_s)


def loop(loader, step, reads_losses):
    began, last = time.perf_counter(), None
    for batch in loader:
        last = step(batch)
        if reads_losses and last is not None:
            last.result()
    if last is not None:
        last.result()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--milliseconds", type=float, default=5, help="of a step, and of reading a batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    read_s = args.milliseconds / 1000
    step = Device(read_s).step

    def prepared(read_s, **settings):
        accelerator = Accelerator(backend=args.backend, cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
        return accelerator.prepare_data_loader(SlowBatches(args.steps, read_s, args.width))

    at_once = prepared(0.0)
    reading = prepared(read_s)
    contenders = {
        (reads_losses, background, depth): prepared(read_s, prefetch_batches=depth, read_in_background=background)
        for reads_losses in (True, False)
        for background in (False, True)
        for depth in DEPTHS
    }
    overlaps = {name: [] for name in contenders}
    for number in range(args.rounds):
        alone = loop(at_once, step, True) + loop(reading, lambda batch: None, False)
        for name in list(contenders) if number % 2 else reversed(list(contenders)):
            overlaps[name].append((alone - loop(contenders[name], step, name[0])) / (alone / 2))

    print(f"{args.backend}, {args.steps} steps, reading and a step {read_s * 1e3:.1f} ms each, {machine()}")
    print(f"{'loop':28} {'reading':24} " + " ".join(f"depth {depth:>2}" for depth in DEPTHS))
    rows = {}
    for reads_losses in (True, False):
        for background in (False, True):
            words = (
                "reads every loss" if reads_losses else "reads no loss",
                "in a thread" if background else "by the loop",
            )
            found = [statistics.median(overlaps[reads_losses, background, depth]) for depth in DEPTHS]
            rows[", ".join(words)] = dict(zip(map(str, DEPTHS), found, strict=True))
            print(f"{words[0]:28} {words[1]:24} " + " ".join(f"{overlap:8.2f}" for overlap in found))
    if args.output:
        save(args.output, {"backend": args.backend, "read_s": read_s, "rounds": args.rounds, "overlap": rows})


if __name__ == "__main__":
    main()
