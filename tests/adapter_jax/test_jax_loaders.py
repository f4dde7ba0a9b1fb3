"""Loaders on the jax engine: iterables of numpy batches, grain, and loaders that a bridge cuts."""

from collections import namedtuple

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


def test_lists_of_text_namedtuples_and_registered_classes_are_cut_with_their_samples():
    class Graph:
        def __init__(self, nodes, edges):
            self.nodes, self.edges = nodes, edges

    jax.tree_util.register_pytree_node(
        Graph, lambda graph: ((graph.nodes, graph.edges), None), lambda _, both: Graph(*both)
    )
    Row = namedtuple("Row", "text word graph")
    batches = [
        Row([str(i) for i in ids], np.array([f"w{i}" for i in ids]), Graph(np.array(ids), np.ones((len(ids), 2))))
        for ids in ([0, 1], [2, 3], [4])
    ]
    loader = open_engine(2).prepare_loader(batches, LoaderSpec())
    first, last = list(loader)
    assert isinstance(first, Row)
    assert isinstance(first.graph, Graph)
    assert isinstance(first.graph.nodes, jax.Array)
    assert first.text == ["0", "1", "2", "3"]
    assert last.text == ["4", "0", "1", "2"]
    assert last.word.tolist() == ["w4", "w0", "w1", "w2"]
    assert last.graph.nodes.tolist() == [4, 0, 1, 2]
    assert last.graph.edges.shape == (4, 2)
    with pytest.raises(PrepareError, match="different containers"):
        list(open_engine(2).prepare_loader([{"x": np.ones(2)}, {"y": np.ones(2)}], LoaderSpec()))


def grain_loaders():
    class Seeded(grain.transforms.RandomMap):
        def random_map(self, element, rng):
            return {"x": element + rng.random()}

    numbers = np.arange(22, dtype=np.float32)
    shuffled = grain.MapDataset.source(numbers).seed(7).shuffle().random_map(Seeded()).batch(2)
    sampler = grain.samplers.IndexSampler(
        22, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=3
    )
    operations = [Seeded(), grain.transforms.Batch(2)]
    return {
        "map dataset": lambda: shuffled,
        "iter dataset": lambda: shuffled.to_iter_dataset(),
        "loader": lambda: grain.DataLoader(data_source=numbers, sampler=sampler, operations=operations),
    }


@pytest.mark.parametrize("kind", ["map dataset", "iter dataset", "loader"])
@pytest.mark.parametrize("in_background", [False, True])
def test_grain_continues_where_it_stood_without_reading_what_was_used(kind, in_background):
    class Counting:
        """The grain object, and how many batches were read from it."""

        def __init__(self, inner):
            self.inner, self.num_read = inner, 0

        def __iter__(self):
            inner, outer = iter(self.inner), self

            class Reading:
                get_state, set_state = inner.get_state, inner.set_state

                def __iter__(self):
                    return self

                def __next__(self):
                    outer.num_read += 1
                    return next(inner)

            return Reading()

    engine, spec = open_engine(2), LoaderSpec(read_in_background=in_background)
    loader = engine.prepare_loader(grain_loaders()[kind](), spec)
    expected = [np.asarray(batch["x"]).tolist() for batch in loader]
    assert len(expected) == 6
    state = None
    for number, _ in enumerate(loader):
        if number == 3:
            state = loader.state
            break
    source = Counting(grain_loaders()[kind]())
    resumed = engine.prepare_loader(source, spec)
    resumed.load_state(state)
    assert [np.asarray(batch["x"]).tolist() for batch in resumed] == expected[4:], (
        "completed from the first samples, too"
    )
    assert source.num_read <= 2 + 2 * 2 + 1  # what is left, its end, and the beginning that completes the last batch


def test_an_iterator_can_be_used_for_one_pass_only():
    loader = open_engine().prepare_loader(iter(numbers(4, 2)), LoaderSpec())
    assert len(seen(loader)) == 2
    with pytest.raises(PrepareError, match="gives its batches once"):
        list(loader)


def test_batches_stay_on_the_host_where_nothing_is_to_be_placed():
    (batch,) = open_engine().prepare_loader(numbers(2, 2), LoaderSpec(device_placement=False))
    assert isinstance(batch["x"], np.ndarray)
