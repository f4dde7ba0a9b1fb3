"""Batches on four virtual devices: cut along the first dimension, transferred ahead, complete or short at the end."""

import numpy as np
import pytest
import torch
import torch_xla
from adapter_xla.cases import MLP, adamw, classification_loss, torch_losses, vectors, xla_losses
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator
from polyaccel.errors import PrepareError

ROWS = torch.arange(22.0).reshape(22, 1)


def sharding_of(tensor):
    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def test_a_batch_is_cut_along_its_first_dimension_and_everything_else_is_repeated():
    class WithMask(TensorDataset):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    def collate(rows):
        x = torch.stack([row[0] for row in rows])
        return {"x": x, "causal": torch.ones(3, 3), "scale": torch.tensor(2.0), "name": "rows"}

    accelerator = Accelerator(backend="xla")
    loader = accelerator.prepare(DataLoader(WithMask(ROWS), batch_size=2, collate_fn=collate))
    batch = next(iter(loader))
    assert batch["x"].shape == (8, 1)
    assert batch["x"].device == accelerator.device
    assert sharding_of(batch["x"]) == "{devices=[4,1]0,1,2,3}"
    assert sharding_of(batch["causal"]) in ("", "{replicated}")
    assert batch["scale"].item() == 2.0
    assert batch["name"] == "rows"


def test_the_global_batch_has_the_loaders_batch_size_per_data_shard():
    accelerator = Accelerator(backend="xla")
    assert accelerator.num_data_shards == 4
    assert accelerator.num_processes == 1
    loader = accelerator.prepare(DataLoader(TensorDataset(ROWS), batch_size=2))
    assert loader.total_batch_size == 8
    batches = [batch[0].cpu().flatten().tolist() for batch in loader]
    assert batches[0] == [*range(8)]
    assert batches[-1] == [16, 17, 18, 19, 20, 21, 0, 1]  # completed from the first samples
    metrics = torch.cat([accelerator.gather_for_metrics(batch[0]).cpu() for batch in loader])
    torch.testing.assert_close(metrics, ROWS)  # every sample once


def test_a_short_last_batch_is_cut_unevenly_and_its_mean_counts_real_rows_only():
    accelerator = Accelerator(backend="xla", even_batches=False)
    loader = accelerator.prepare(DataLoader(TensorDataset(ROWS), batch_size=2))
    last = [batch[0] for batch in loader][-1]
    assert last.shape == (6, 1)
    assert last.mean().item() == pytest.approx(ROWS[16:].mean().item())


def test_training_with_a_short_last_batch_equals_torch():
    torch.manual_seed(0)
    model, data = MLP(), vectors(38)  # 16, 16, 6
    expected, _ = torch_losses(model, data, classification_loss, epochs=7, optimizer=adamw)
    losses, _, _ = xla_losses(model, data, classification_loss, epochs=7, optimizer=adamw, even_batches=False)
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 1e-4  # float32, 21 steps


def test_a_batch_that_cannot_be_cut_names_both_numbers():
    accelerator = Accelerator(backend="xla", split_batches=True)
    with pytest.raises(PrepareError, match=r"batch_size=6.*4 data shards"):
        accelerator.prepare(DataLoader(TensorDataset(ROWS), batch_size=6))


def test_batches_of_changing_size_that_cannot_be_cut_name_both_numbers():
    class Buckets:  # a batch sampler without one batch size
        def __iter__(self):
            return iter([[0, 1], [2], [3], [4], [5], [6], [7], [8]])

        def __len__(self):
            return 8

    accelerator = Accelerator(backend="xla")
    loader = accelerator.prepare(DataLoader(TensorDataset(ROWS), batch_sampler=Buckets()))
    with pytest.raises(PrepareError, match=r"batch of 5 samples.*4 data shards"):
        list(loader)


def test_the_shuffled_order_is_that_of_the_users_own_loader():
    def shuffled(batch_size):
        generator = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(ROWS), batch_size=batch_size, shuffle=True, generator=generator, drop_last=True)

    accelerator = Accelerator(backend="xla")
    loader = accelerator.prepare(shuffled(2))
    for _ in range(2):  # epochs
        ours = [batch[0].cpu().flatten().tolist() for batch in loader]
    plain = shuffled(8)
    for _ in range(2):
        theirs = [batch[0].flatten().tolist() for batch in plain]
    assert ours == theirs
    assert loader.drop_last


def test_what_is_no_tensor_stays_as_it_is():
    accelerator = Accelerator(backend="xla")
    data = [(np.float32(1.0), torch.ones(2), "a")] * 8
    loader = accelerator.prepare(DataLoader(data, batch_size=2))
    numbers, tensor, names = next(iter(loader))
    assert tensor.shape == (8, 2)
    assert names in (["a"] * 8, ("a",) * 8)  # torch's own collate function decides
    assert numbers.device == accelerator.device
