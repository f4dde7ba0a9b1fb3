"""Loaders on the jax engine: iterables of numpy batches, grain, and loaders that a bridge cuts."""

import grain
import jax
import numpy as np
import pytest
from jax_engines import open_engine

from polyaccel.errors import PrepareError
from polyaccel.protocols import LoaderSpec


def numbers(num_samples, batch_size):
    samples = np.arange(num_samples, dtype=np.float32)
    return [{"x": samples[i : i + batch_size], "tag": "train"} for i in range(0, num_samples, batch_size)]


def seen(loader):
    return [(np.asarray(batch["x"]).tolist(), loader.remainder, loader.end_of_dataloader) for batch in loader]


def test_batches_arrive_on_the_device_and_keep_what_is_no_array():
    engine = open_engine()
    loader = engine.prepare_loader(numbers(8, 4), LoaderSpec())
    batch = next(iter(loader))
    assert isinstance(batch["x"], jax.Array)
    assert batch["tag"] == "train"
    assert len(loader) == 2
    assert seen(loader) == [([0, 1, 2, 3], -1, False), ([4, 5, 6, 7], -1, True)]


def test_each_data_shard_takes_a_batch_of_its_own():
    engine = open_engine(4)
    loader = engine.prepare_loader(numbers(16, 2), LoaderSpec())
    assert len(loader) == 2
    assert seen(loader) == [(list(range(8)), -1, False), (list(range(8, 16)), -1, True)]
    assert next(iter(loader))["x"].sharding == engine.mesh.batch


def test_a_short_last_batch_is_completed_from_the_first_samples():
    engine = open_engine(4)
    loader = engine.prepare_loader(numbers(11, 2), LoaderSpec())
    assert seen(loader) == [(list(range(8)), -1, False), ([8, 9, 10, 0, 1, 2, 3, 4], 3, True)]
    short = engine.prepare_loader(numbers(11, 2), LoaderSpec(even_batches=False))
    assert seen(short)[-1] == ([8, 9, 10], 3, True)


def test_split_batches_cuts_every_batch():
    engine = open_engine(4)
    loader = engine.prepare_loader(numbers(16, 8), LoaderSpec(split_batches=True))
    assert [values for values, _, _ in seen(loader)] == [list(range(8)), list(range(8, 16))]
    with pytest.raises(PrepareError, match="batch_size=6 over 4 data shards"):
        seen(engine.prepare_loader(numbers(12, 6), LoaderSpec(split_batches=True)))


def test_a_generator_has_no_length_and_works():
    engine = open_engine()
    loader = engine.prepare_loader((batch for batch in numbers(4, 2)), LoaderSpec())
    with pytest.raises(TypeError):
        len(loader)
    assert len(seen(loader)) == 2


def test_grain_datasets_and_loaders():
    engine = open_engine(2)
    source = grain.MapDataset.source(np.arange(8, dtype=np.float32)).map(lambda value: {"x": value})
    datasets = [source.batch(2), source.to_iter_dataset().batch(2)]
    loader = grain.DataLoader(
        data_source=np.arange(8, dtype=np.float32),
        sampler=grain.samplers.SequentialSampler(8, shard_options=grain.sharding.NoSharding()),
        operations=[_AsDict(), grain.transforms.Batch(2)],
    )
    for grain_loader in (*datasets, loader):
        prepared = engine.prepare_loader(grain_loader, LoaderSpec())
        assert [values for values, _, _ in seen(prepared)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class _AsDict(grain.transforms.Map):
    def map(self, element):
        return {"x": element}


def test_what_a_bridge_lifts_is_what_user_code_gets_and_keeps_64_bits():
    engine = open_engine()
    host = [{"x": np.asarray([2**40, 1])}]
    lifted = engine.prepare_loader(host, LoaderSpec(lift=lambda host, placed: (host, placed)))
    ((batch, placed),) = list(lifted)
    assert batch is host[0]
    assert int(placed["x"][0]) == 2**40
    plain = engine.prepare_loader(host, LoaderSpec())
    assert next(iter(plain))["x"].dtype == np.int32


def test_a_loader_is_not_prepared_twice_and_must_be_iterable():
    engine = open_engine()
    loader = engine.prepare_loader(numbers(4, 2), LoaderSpec())
    with pytest.raises(PrepareError, match="prepared already"):
        engine.prepare_loader(loader, LoaderSpec())
    with pytest.raises(PrepareError, match="cannot be iterated"):
        engine.prepare_loader(3, LoaderSpec())
