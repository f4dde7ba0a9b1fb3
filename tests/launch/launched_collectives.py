"""Run by test_launch.py in every process of a job of two: each collective against what arithmetic says."""

import sys

import numpy as np
import torch

from polyaccel import Accelerator
from polyaccel.errors import PolyaccelError

accelerator = Accelerator(cpu=True)
rank, n = accelerator.process_index, accelerator.num_processes
assert n == 2, n
# A model tells the accelerator that this is a torch script: from here on user code holds torch tensors on every engine.
model = accelerator.prepare(torch.nn.Linear(2, 1))


def same(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected))


mine = torch.arange(2.0) + 10 * rank  # (2,)
same(accelerator.gather(mine), [0, 1, 10, 11])
same(accelerator.gather(torch.tensor(float(rank))), [0, 1])
tree = accelerator.gather({"a": [mine], "flag": torch.tensor([rank == 1])})
same(tree["a"][0], [0, 1, 10, 11])
assert np.asarray(tree["flag"]).tolist() == [False, True]
same(accelerator.gather(torch.tensor([rank], dtype=torch.int64) + 2**40), [2**40, 2**40 + 1])
same(accelerator.reduce(mine, "sum"), [10, 12])
same(accelerator.reduce(mine, "mean"), [5, 6])
same(accelerator.reduce(mine, "max"), [10, 11])
same(accelerator.reduce(mine, "sum", scale=0.5), [5, 6])
same(accelerator.broadcast(mine, from_process=1), [10, 11])
assert accelerator.gather_object([{"rank": rank}]) == [{"rank": 0}, {"rank": 1}]
assert accelerator.gather_for_metrics([f"text {rank}"]) == ["text 0", "text 1"]
values = ["hello", 1] if rank == 0 else [None, None]
assert accelerator.broadcast_object_list(values) == ["hello", 1]

ragged = torch.ones(rank + 1, 2)
padded = accelerator.pad_across_processes(ragged, dim=0, pad_index=-1)
same(padded.shape, [2, 2])
same(accelerator.gather(padded), [[1, 1], [-1, -1], [1, 1], [1, 1]])
same(accelerator.pad_across_processes(ragged, dim=0, pad_index=-1, pad_first=True)[-1], [1, 1])
assert accelerator.pad_across_processes(mine, dim=3) is mine

with accelerator.split_between_processes([1, 2, 3]) as part:
    assert part == ([1, 2] if rank == 0 else [3])
with accelerator.main_process_first():
    pass
assert accelerator.on_main_process(lambda: "ran")() == ("ran" if rank == 0 else None)
assert accelerator.on_last_process(lambda: "ran")() == ("ran" if rank == 1 else None)
assert accelerator.on_process(process_index=1)(lambda: "ran")() == ("ran" if rank == 1 else None)
accelerator.wait_for_everyone()

# Seven rows in batches of two per process: four, and three completed to four; every row counts once.
rows = torch.utils.data.TensorDataset(torch.arange(7.0))
loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=2 // (accelerator.num_data_shards // n)))
seen = np.concatenate([np.asarray(accelerator.gather_for_metrics(batch)) for (batch,) in loader])
same(np.sort(seen), np.arange(7))

try:
    accelerator.gather_object([object()])
except PolyaccelError:
    pass
else:
    raise AssertionError("an object that cannot be sent was accepted")

accelerator.print("all collectives agree")
accelerator.end_training()
if "--fail" in sys.argv and rank == 1:
    sys.exit(7)
