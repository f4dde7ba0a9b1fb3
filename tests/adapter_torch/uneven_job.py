"""Run by test_torch_uneven_inputs.py in each of three processes: loops of different lengths, judged here against arithmetic."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from polyaccel import Accelerator, GradientAccumulationPlugin
from polyaccel.errors import UnsupportedError

run = Accelerator(even_batches=False)
rank, n = run.process_index, run.num_processes
assert n == 3, n


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def refused(words, call):
    with pytest.raises(UnsupportedError, match=words):
        call()


def loader_over(numbers, batch_size, accelerator=run):
    return accelerator.prepare(DataLoader(TensorDataset(torch.tensor(numbers)), batch_size=batch_size))


# -- metrics: 7 samples in batches of 2 are 2, 2, 2 and then 1, 0, 0; 5 in batches of 1 are 1, 1, 1 and then 1, 1, 0
def gathered(count, batch_size, value):
    return [run.gather_for_metrics(value(numbers)) for (numbers,) in loader_over([*range(count)], batch_size)]


for count, batch_size, lengths in ((7, 2, [6, 1]), (5, 1, [3, 2]), (10, 2, [6, 4]), (11, 2, [6, 5])):
    present = len(gathered(count, batch_size, lambda numbers: numbers))
    found = gathered(count, batch_size, lambda numbers: {"number": numbers, "text": [str(int(i)) for i in numbers]})
    assert len(found) == present
    assert [len(one["number"]) for one in found] == lengths[:present], found
    assert torch.cat([one["number"] for one in found]).tolist() == [*range(sum(lengths[:present]))]
    assert [text for one in found for text in one["text"]] == [str(i) for i in range(sum(lengths[:present]))]
    assert present == 2 or rank == 2 or (count == 7 and rank == 1)
boxes = run.gather_for_metrics([torch.full((rank + 1, 4), float(rank))], use_gather_object=True)
assert [tuple(box.shape) for box in boxes] == [(1, 4), (2, 4), (3, 4)]
assert all(torch.is_tensor(box) for box in boxes)


# -- training: a process without a batch counts as a gradient of 0, and ends with the parameters of the last
def train(numbers):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    model, optimizer, loader = run.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(TensorDataset(torch.tensor(numbers)), batch_size=1),
    )
    with run.join_uneven_inputs([model]):
        for (x,) in loader:
            run.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
    return model, run.unwrap_model(model).weight.item()


model, weight = train([[1.0], [2.0], [3.0], [4.0]])  # one process alone has the fourth
assert abs(weight - (1 - 0.1 * (1 + 2 + 3) / 3 - 0.1 * 4 / 3)) < 1e-6, weight
assert run.gather_for_metrics([weight]) == [weight] * 3
model(torch.ones(1, 1)).sum().backward()  # joined no more: all processes exchange again


def function_form():
    with run.join_uneven_inputs([model]):
        run.backward(lambda network: network(torch.ones(1, 1)).sum(), model)


refused("needs a number from every process", function_form)
run.wait_for_everyone()

# -- even_batches for a while, nested
even = Accelerator()
model = even.prepare(torch.nn.Linear(1, 1))
loader = loader_over([*range(4)], 1, even)
lengths = []
with even.join_uneven_inputs([model], even_batches=False):
    lengths.append(len(list(loader)))
    with even.join_uneven_inputs([model], even_batches=True):
        lengths.append(len(list(loader)))
    lengths.append(len(list(loader)))
lengths.append(len(list(loader)))
assert lengths == [2 if rank == 0 else 1, 2, 2 if rank == 0 else 1, 2], lengths

even.prepare(DataLoader(Stream(), batch_size=1))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with even.join_uneven_inputs([object()], even_batches=False):
        pass
assert ["multi-process" in str(one.message) for one in caught] == [True, False], caught
assert "map-style" in str(caught[1].message)

windows = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2))
model = windows.prepare(torch.nn.Linear(1, 1))
refused("gradient_accumulation_steps=2", lambda: windows.join_uneven_inputs([model], even_batches=False).__enter__())
run.print("uneven inputs hold")
run.end_training()
