"""A prepared torch loader is a DataLoader with Accelerate's attributes; options, nesting and leaving a loop change nothing of that."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch_network import accelerator
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaccel import DataLoaderConfiguration
from polyaccel.data import DataSharding, LoaderState, PreparedLoader, prepared_loader
from polyaccel.protocols import LoaderSpec
from polyaccel_torch.dialect.loaders import SeedableRandomSampler, ShardedLoader, TorchHostLoader

NUMBERS = list(range(22))
# torchdata 0.11 calls what torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def cut(loader, num_shards=1, shard=0, **options) -> PreparedLoader:
    return prepared_loader(TorchHostLoader(loader).shard(DataSharding(num_shards, shard), spec=LoaderSpec(**options)))


def lists(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_it_is_a_dataloader_with_the_attributes_of_the_users_and_those_of_accelerate():
    run = accelerator()
    own = DataLoader(NUMBERS, batch_size=4, drop_last=True, collate_fn=torch.tensor)
    loader = run.prepare(own)
    assert isinstance(loader, DataLoader)
    assert isinstance(loader, PreparedLoader)
    assert (loader.dataset, loader.batch_size, loader.drop_last, loader.num_workers) == (NUMBERS, 4, True, 0)
    assert loader.collate_fn is torch.tensor
    assert loader.batch_sampler is own.batch_sampler
    assert loader.sampler is own.sampler
    assert (loader.total_batch_size, loader.total_dataset_length, loader.iteration) == (4, 22, 0)
    assert loader.gradient_state is run.gradient_state
    seen = [(loader.end_of_dataloader, loader.remainder) for _ in loader]
    assert seen == [(False, -1)] * 4 + [(True, -1)]
    assert (loader.iteration, len(loader)) == (1, 5)
    loader.iteration = 7
    assert loader.epoch == 7
    assert run.prepare(loader) is loader


def test_several_shards_show_the_cut_batch_sampler_around_the_users_own():
    own = DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 4, False))
    loader = cut(own, 2, 1)
    assert loader.batch_sampler.batch_sampler is own.batch_sampler
    assert loader.batch_sampler.even_batches
    loader.batch_sampler.even_batches = False
    assert lists(loader)[-1] == [20, 21]
    assert (loader.total_batch_size, loader.batch_sampler.batch_size) == (8, 4)


def test_assigning_to_a_prepared_loader_costs_what_assigning_to_any_object_costs():
    assert ShardedLoader.__setattr__ is object.__setattr__


def test_a_seedable_order_follows_from_seed_and_epoch_alone():
    def orders(data_seed, start):
        torch.manual_seed(99)
        loader = cut(DataLoader(NUMBERS, batch_size=4, shuffle=True), use_seedable_sampler=True, data_seed=data_seed)
        assert isinstance(loader.sampler, SeedableRandomSampler)
        torch.rand(3)
        loader.set_epoch(start)
        return [lists(loader), lists(loader)]

    first = orders(3, 0)
    assert orders(3, 1)[0] == first[1] != first[0]
    assert orders(4, 0)[0] == first[1], "the seed of an epoch is the data seed plus its number"
    assert orders(None, 0) == orders(99, 0), "without a data seed it is that of set_seed"


def test_processes_with_other_seeds_take_the_seedable_order_of_process_0():
    said: list = []

    def order(process, exchange):
        torch.manual_seed(process)
        loader = DataLoader(NUMBERS, batch_size=11, shuffle=True)
        spec = LoaderSpec(use_seedable_sampler=True)
        return lists(
            prepared_loader(TorchHostLoader(loader).shard(DataSharding(2, 0, 2), spec=spec, exchange=exchange))
        )

    first = order(0, lambda value: said.append(value) or [value])
    assert order(1, lambda value: [said.pop(0)]) == first


def test_a_batch_sampler_of_a_users_class_keeps_its_identity_with_a_seedable_sampler():
    class Mine(BatchSampler):
        """Steered by its user."""

    batches = Mine(RandomSampler(NUMBERS), 4, False)
    loader = cut(DataLoader(NUMBERS, batch_sampler=batches), use_seedable_sampler=True, data_seed=1)
    assert loader.batch_sampler is batches
    assert isinstance(batches.sampler, SeedableRandomSampler)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_state_dict_and_load_state_dict_continue_a_shuffled_pass_and_those_after_it(stateful, workers):
    def make(seed):
        torch.manual_seed(seed)
        loader = DataLoader(NUMBERS, batch_size=4, shuffle=True, num_workers=workers)
        return cut(loader, use_stateful_dataloader=stateful, use_seedable_sampler=True, data_seed=seed)

    loader = make(1)
    lists(loader)
    whole, state = [], None
    for number, batch in enumerate(loader):
        whole.append(batch.tolist())
        if number == 1:
            state = loader.state_dict()
    resumed = make(2)
    resumed.load_state_dict(state)
    assert isinstance(resumed, StatefulDataLoader) is stateful
    assert [lists(resumed), lists(resumed)] == [whole[2:], lists(loader)]


def test_the_state_of_a_stateful_loader_is_torchdatas_own():
    alone = StatefulDataLoader(NUMBERS, batch_size=4)
    loader = cut(DataLoader(NUMBERS, batch_size=4), use_stateful_dataloader=True)
    for _, _ in zip(range(3), loader, strict=False):
        ours = loader.state_dict()
    steps = iter(alone)
    for _ in range(3):
        next(steps)
    assert ours == alone.state_dict()
    alone.load_state_dict(ours)
    assert [batch.tolist() for batch in alone] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21]]


def test_a_state_of_the_end_of_a_pass_continues_with_the_next_one():
    loader = cut(DataLoader(NUMBERS, batch_size=4), use_stateful_dataloader=True)
    lists(loader)
    again = cut(DataLoader(NUMBERS, batch_size=4), use_stateful_dataloader=True)
    again.load_state_dict(loader.state_dict())
    assert (again.epoch, lists(again)) == (1, lists(loader))


def test_a_checkpoint_of_the_last_batch_of_a_stateful_loader_continues_with_the_next_pass():
    def make(stateful):
        loader = DataLoader(NUMBERS, batch_size=4, shuffle=True)
        return cut(loader, use_stateful_dataloader=stateful, use_seedable_sampler=True, data_seed=1)

    loader = make(True)
    state = [loader.state for _ in loader][-1]
    second = lists(loader)
    for stateful, following in ((True, second), (False, [])):
        again = make(stateful)
        again.load_state(state)
        assert lists(again) == following, (
            "torchdata has no empty rest; else the rest of a pass is what was not seen of it"
        )
        assert again.epoch == 1 + stateful


def test_a_users_own_stateful_loader_stays_one():
    loader = cut(StatefulDataLoader(NUMBERS, batch_size=4, shuffle=True))
    assert isinstance(loader, StatefulDataLoader)
    state = None
    whole = []
    for number, batch in enumerate(loader):
        whole.append(batch.tolist())
        if number == 2:
            state = loader.state_dict()
    again = cut(StatefulDataLoader(NUMBERS, batch_size=4, shuffle=True))
    again.load_state_dict(state)
    assert lists(again) == whole[3:]


def test_skipping_keeps_every_option_and_knows_the_last_batch():
    for options in ({}, {"dispatch_batches": True}, {"use_stateful_dataloader": True}):
        loader = cut(DataLoader(NUMBERS, batch_size=4), 2, 1, **options)
        rest = loader.skipping(2)
        assert type(rest) is type(loader)
        assert [(batch.tolist(), rest.end_of_dataloader, rest.remainder) for batch in rest] == [
            ([20, 21, 0, 1], True, 6)
        ]
        assert (len(rest), rest.drop_last, rest.skip_batches) == (1, False, 2)


def test_inner_loops_and_loops_that_are_left_report_what_is_active():
    run = accelerator()
    outer, inner = run.prepare(DataLoader(NUMBERS, batch_size=11), DataLoader(NUMBERS, batch_size=11))
    for _ in outer:
        for _ in inner:
            assert run.gradient_state.active_dataloader is inner
            break
        assert run.gradient_state.active_dataloader is outer
    assert run.gradient_state.active_dataloader is None
    for _ in outer:
        break
    assert run.gradient_state.active_dataloader is None
    assert not run.gradient_state.end_of_dataloader


def test_non_blocking_reads_into_pinned_memory_where_batches_go_to_a_gpu():
    host = TorchHostLoader(DataLoader(NUMBERS)).shard(DataSharding(), pin_memory=True)
    assert host.source.pin_memory
    assert not host.loader.pin_memory
    run = accelerator(dataloader_config=DataLoaderConfiguration(non_blocking=True))
    assert not run.prepare(DataLoader(NUMBERS)).base_dataloader.pin_memory, "on a CPU nothing is copied"


def test_an_iterable_with_a_state_of_its_own_goes_on_from_it():
    class Source:
        position, started_at = 0, None

        def __iter__(self):
            self.started_at = self.position
            while self.position < 6:
                self.position += 1
                yield torch.tensor([self.position])
            self.position = 0

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    loader = cut(Source())
    for number, _ in enumerate(loader):
        if number == 1:
            state = loader.state
    assert isinstance(state, LoaderState)
    source = Source()
    again = cut(source)
    again.load_state(state)
    assert [batch.tolist() for batch in again] == [[3], [4], [5], [6]]
    assert source.started_at == 2, "nothing is read twice"


def test_an_iterable_that_passes_through_prepare_is_saved_if_it_knows_where_it_stands(tmp_path):
    class Source:
        def __init__(self, position):
            self.position = position

        def __iter__(self):
            return iter(range(self.position, 4))

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    run, source = accelerator(), Source(3)
    assert run.prepare(source) is source
    assert run.prepare(source) is source, "once is enough"
    run.save_state(str(tmp_path / "saved"), blocking=True)
    again, other = accelerator(), Source(0)
    assert again.prepare(other) is other
    again.load_state(str(tmp_path / "saved"))
    assert list(other) == [3]


def test_a_state_that_is_no_plain_data_is_named_when_it_is_saved():
    class Source:
        def __iter__(self):
            return iter([torch.ones(1), torch.ones(1)])

        def state_dict(self):
            return {"open file": object()}

        def load_state_dict(self, state):
            raise AssertionError

    loader = cut(Source())
    next(iter(loader))
    steps = iter(loader)
    next(steps)
    with pytest.raises(Exception, match=r"builtins\.object"):
        _ = loader.state


def test_datasets_of_hugging_face_are_map_style_or_streams():
    class Rows:
        """What datasets.Dataset offers to a DataLoader: rows by a list of numbers."""

        def __len__(self):
            return 10

        def __getitems__(self, keys):
            return [{"x": key} for key in keys]

    loader = cut(DataLoader(Rows(), batch_size=2), 2, 1)
    assert [batch["x"].tolist() for batch in loader] == [[2, 3], [6, 7], [0, 1]]

    class Examples(IterableDataset):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([{"x": key} for key in range(5)])

    dataset = Examples()
    stream = cut(DataLoader(dataset, batch_size=2), 2, 1, dispatch_batches=False)
    assert [(batch["x"].tolist(), stream.remainder) for batch in stream] == [([2, 3], -1), ([1, 2], 1)]
    assert dataset.epoch == 0
