"""What scripts rely on: names and limits of checkpoints, hooks, registered objects, several models, Accelerate's way to resume."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from polyaccel import Accelerator, set_seed, skip_first_batches
from polyaccel.checkpoint import open_checkpoint
from polyaccel.config.project import ProjectConfiguration
from polyaccel.errors import CheckpointError, PrepareError

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler  # noqa: E402


def accelerator(folder: Path | None = None, **settings) -> Accelerator:
    settings.setdefault("project_config", ProjectConfiguration(folder))
    return Accelerator(backend="torch", cpu=True, **settings)


def script(folder: Path | None = None, *, loader=None, seed: int = 0, kind=torch.optim.SGD, width: int = 3, **settings):
    """(accelerator, model, optimizer, loader) of a small regression."""
    set_seed(seed)
    acc = accelerator(folder, **settings)
    model = nn.Linear(2, width)
    data = TensorDataset(torch.arange(22.0).reshape(11, 2))
    loader = DataLoader(data, batch_size=2, shuffle=True) if loader is None else loader(data)
    return acc, *acc.prepare(model, kind(model.parameters(), lr=0.01), loader)


def step(acc, model, optimizer, batch) -> None:
    acc.backward(model(batch[0] / 22).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- names -----------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_numbered_and_the_number_is_continued_after_a_resume(tmp_path):
    acc, *_ = script(tmp_path)
    assert [Path(acc.save_state()).name for _ in range(2)] == ["checkpoint_0", "checkpoint_1"]
    acc.end_training()
    resumed, *_ = script(tmp_path)
    assert Path(resumed.load_state()).name == "checkpoint_1"
    assert resumed.save_iteration == 2
    assert Path(resumed.save_state()).name == "checkpoint_2"
    resumed.end_training()


def test_going_back_to_an_older_checkpoint_overwrites_none(tmp_path):
    acc, *_ = script(tmp_path)
    paths = [acc.save_state() for _ in range(3)]
    acc.load_state(paths[0])
    assert Path(acc.save_state(blocking=True)).name == "checkpoint_3"
    acc.end_training()


def test_a_new_run_in_the_folder_of_another_is_refused_before_anything_is_written(tmp_path):
    acc, *_ = script(tmp_path)
    acc.save_state()
    acc.end_training()
    other, *_ = script(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint_0 exists already"):
        other.save_state()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["checkpoint_0"]
    other.end_training()


def test_the_limit_keeps_the_newest(tmp_path):
    acc, *_ = script(tmp_path, project_config=ProjectConfiguration(tmp_path, total_limit=2))
    for _ in range(4):
        acc.save_state()
    acc.end_training()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert left == ["checkpoint_2", "checkpoint_3"]


def test_a_named_folder_is_replaced_by_the_next_save(tmp_path):
    acc, model, optimizer, loader = script()
    assert acc.save_state(tmp_path / "last") == str(tmp_path / "last")
    before = weights(model)
    step(acc, model, optimizer, next(iter(loader)))
    after = weights(model)
    acc.save_state(tmp_path / "last", blocking=True)
    acc.load_state(tmp_path / "last")
    assert same(weights(model), after)
    assert not same(after, before)
    acc.end_training()


def test_without_a_folder_and_without_a_project_the_error_says_what_to_give():
    acc, *_ = script()
    with pytest.raises(CheckpointError, match="project_dir"):
        acc.save_state()
    with pytest.raises(CheckpointError, match="project_dir"):
        acc.load_state()


def test_pickled_files_are_refused(tmp_path):
    acc, *_ = script()
    with pytest.raises(CheckpointError, match="safe_serialization=False"):
        acc.save_state(tmp_path / "c", safe_serialization=False)


def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_named(tmp_path, caplog):
    acc, *_ = script(tmp_path)
    for _ in range(3):
        acc.save_state()
    acc.end_training()
    (tmp_path / "checkpoints" / "checkpoint_2" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "checkpoint_7").mkdir()
    resumed, *_ = script(tmp_path)
    with caplog.at_level(logging.INFO, "polyaccel.checkpoint"):
        assert Path(resumed.load_state()).name == "checkpoint_1"
    said = caplog.text
    assert "checkpoint_7 was passed over" in said
    assert "checkpoint_2 was passed over" in said
    assert resumed.save_iteration == 8
    resumed.end_training()


# -- what does not fit changes nothing -------------------------------------------------------------------------------------


def one_more_layer(acc, model):
    acc.prepare(nn.Linear(2, 2))


CHANGED = {
    "another shape": ({"width": 4}, None, r"weight has shape \(3, 2\) in the checkpoint and \(4, 2\)"),
    "another optimizer": ({"kind": torch.optim.Adagrad}, None, "optimizer 0 was saved as a SGD and is a Adagrad here"),
    "one model more": ({}, one_more_layer, "holds 1 model, and this script has 2 models"),
    "a registered object": ({}, lambda acc, model: acc.register_for_checkpointing(Counter()), "0 registered objects"),
    "another batch size": (
        {"loader": lambda data: DataLoader(data, batch_size=3)},
        None,
        "the loader stood at sample 4, after 2 global batches of 2, and global batches of 3",
    ),
    "a generator of its own": (
        {"loader": lambda data: DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator())},
        None,
        "saved with 0 random generators of its own and has 1",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_checkpoint_of_another_script_changes_nothing(case, tmp_path):
    acc, model, optimizer, loader = script()
    for number, batch in enumerate(loader):
        step(acc, model, optimizer, batch)
        if number == 1:
            acc.save_state(tmp_path / "c", blocking=True)
            break
    settings, change, message = CHANGED[case]
    other, model, optimizer, _ = script(seed=1, **settings)
    if change is not None:
        change(other, model)
    before, random_state, remembered = weights(model), torch.get_rng_state(), str(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        other.load_state(tmp_path / "c")
    assert same(weights(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert str(optimizer.state_dict()) == remembered


def test_an_open_window_of_another_length_is_refused(tmp_path):
    acc, model, optimizer, loader = script(gradient_accumulation_steps=3)
    for batch in loader:
        with acc.accumulate(model):
            step(acc, model, optimizer, batch)
        acc.save_state(tmp_path / "c", blocking=True)
        break
    other, *_ = script(gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match="window of 3 micro batches"):
        other.load_state(tmp_path / "c")


# -- asynchronous ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_training_after_the_call_does_not_change_what_is_saved(backend, tmp_path, monkeypatch):
    if backend == "jax":
        pytest.importorskip("jax")
    from polyaccel.checkpoint import manager

    may_write, write = threading.Event(), manager.write_checkpoint

    def held_back(*args, **kwargs):
        assert may_write.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(manager, "write_checkpoint", held_back)
    set_seed(0)
    acc = Accelerator(backend=backend, cpu=True)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    # The fused step of jax is given the memory of parameters and state, to be used again.
    update = acc.train_step(lambda model, batch: model(batch).square().mean(), model, optimizer)
    data = torch.ones(4, 2)
    update(data)
    saved = weights(model)
    acc.save_state(tmp_path / "c")
    for _ in range(3):
        update(data)
    assert not same(weights(model), saved)
    may_write.set()
    acc.wait_for_checkpoint()
    acc.load_state(tmp_path / "c")
    assert same(weights(model), saved)
    acc.end_training()


def test_with_the_setting_a_save_is_complete_when_it_returns(tmp_path, monkeypatch):
    from polyaccel.checkpoint import manager

    write = manager.write_checkpoint
    monkeypatch.setattr(manager, "write_checkpoint", lambda *args, **kwargs: (time.sleep(0.5), write(*args, **kwargs)))
    monkeypatch.setenv("POLYACCEL_BLOCKING_SAVES", "1")
    acc, *_ = script()
    assert open_checkpoint(acc.save_state(tmp_path / "c"))
    assert not (tmp_path / "d").exists()
    assert acc.save_state(tmp_path / "d", blocking=False) == str(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    for place in ("cpu", "on_device"):
        assert acc.load_state(tmp_path / "c", map_location=place) == str(tmp_path / "c")
    with pytest.raises(TypeError, match="'elsewhere' is neither"):
        acc.load_state(tmp_path / "c", map_location="elsewhere")
    acc.end_training()


def test_a_failure_to_write_is_raised_by_the_next_call_and_once(tmp_path, monkeypatch):
    from polyaccel.checkpoint import manager

    def full(*args, **kwargs):
        raise CheckpointError("the disk is full", "make room")

    acc, *_ = script(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(manager, "write_checkpoint", full)
        acc.save_state()
        with pytest.raises(CheckpointError, match="the disk is full"):
            acc.wait_for_checkpoint()
    manager.abandon(tmp_path / "checkpoints" / "checkpoint_0", "0" * 16)  # what the failed write would have done
    acc.save_state(blocking=True)
    acc.end_training()


# -- hooks and registered objects ------------------------------------------------------------------------------------------


def test_hooks_write_files_of_the_checkpoint_and_read_them_back(tmp_path):
    acc, model, *_ = script()

    def save_config(models, weights, folder):
        Path(folder, "config.json").write_text(
            json.dumps({"class": type(models[0]).__name__, "arrays": sorted(weights[0])})
        )

    def load_config(models, folder):
        models[0].config = json.loads(Path(folder, "config.json").read_text())

    saving, loading = acc.register_save_state_pre_hook(save_config), acc.register_load_state_pre_hook(load_config)
    acc.save_state(tmp_path / "c", blocking=True)
    acc.load_state(tmp_path / "c")
    assert model.config == {"class": "Linear", "arrays": ["bias", "weight"]}
    saving.remove()
    loading.remove()
    del model.config
    acc.save_state(tmp_path / "d", blocking=True)
    acc.load_state(tmp_path / "c")
    assert not hasattr(model, "config")
    assert not (tmp_path / "d" / "config.json").exists()


def test_a_model_whose_weights_a_hook_takes_is_left_to_the_hooks(tmp_path):
    acc, model, *_ = script()

    def save(models, weights, folder):
        Path(folder, "own.json").write_text(json.dumps(models[0].weight.tolist()))
        weights.pop()

    def load(models, folder):
        own = models.pop()
        with torch.no_grad():
            own.weight.copy_(torch.tensor(json.loads(Path(folder, "own.json").read_text())))

    acc.register_save_state_pre_hook(save)
    path = acc.save_state(tmp_path / "c", blocking=True)
    assert "model" not in open_checkpoint(path).groups
    with pytest.raises(CheckpointError, match="no arrays of model"):
        acc.load_state(path)
    acc.register_load_state_pre_hook(load)
    before = model.weight.clone()
    torch.nn.init.zeros_(model.weight)
    acc.load_state(path)
    assert torch.equal(model.weight, before)


class Counter:
    """Anything with the two methods."""

    def __init__(self) -> None:
        self.state = {
            "n": 0,
            3: ("a", None),
            "mean": torch.zeros(2, dtype=torch.bfloat16),
            "nested": [{"x": float("inf")}],
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_registered_objects_come_back_as_they_were(tmp_path):
    acc, *_ = script()
    counter = Counter()
    acc.register_for_checkpointing(counter)
    counter.state["n"], counter.state["mean"] = 7, torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    acc.save_state(tmp_path / "c", blocking=True)
    other, *_ = script()
    fresh = Counter()
    other.register_for_checkpointing(fresh)
    other.load_state(tmp_path / "c")
    assert fresh.state["n"] == 7
    assert fresh.state[3] == ("a", None)
    assert fresh.state["nested"] == [{"x": float("inf")}]
    assert fresh.state["mean"].dtype == torch.bfloat16
    assert fresh.state["mean"].tolist() == [1.5, -2.0]


def test_registering_names_what_cannot_be_saved():
    acc, model, *_ = script()
    with pytest.raises(CheckpointError, match=r"Item at index 0 is a int. Item at index 2 is a object"):
        acc.register_for_checkpointing(1, model, object())


def test_an_object_that_refuses_its_state_leaves_everything_as_it_was(tmp_path):
    class Refusing(Counter):
        def load_state_dict(self, state):
            if state["n"] == 7:
                raise ValueError("not this one")
            super().load_state_dict(state)

    acc, model, *_ = script()
    first, second = Counter(), Refusing()
    acc.register_for_checkpointing(first, second)
    first.state["n"] = second.state["n"] = 7
    acc.save_state(tmp_path / "c", blocking=True)
    first.state = {**first.state, "n": 8}
    second.state = {**second.state, "n": 8}
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="not this one"):
        acc.load_state(tmp_path / "c")
    assert (first.state["n"], second.state["n"]) == (8, 8)
    assert not model.weight.any()


def test_what_a_registered_object_keeps_is_data_or_refused_by_name(tmp_path):
    acc, *_ = script()
    counter = Counter()
    counter.state = {"callback": print}
    acc.register_for_checkpointing(counter)
    acc.save_state(tmp_path / "c")
    with pytest.raises(CheckpointError, match="callback"):
        acc.wait_for_checkpoint()


# -- several models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_models_and_two_optimizers_each_get_their_own(backend, tmp_path):
    if backend == "jax":
        pytest.importorskip("jax")

    def pair():
        set_seed(3)
        acc = Accelerator(backend=backend, cpu=True)
        one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        three = nn.Linear(2, 1)
        both = torch.optim.Adam([*one.parameters(), *two.parameters()], lr=0.1)
        last = torch.optim.SGD(three.parameters(), lr=0.1, momentum=0.9)
        return acc, *acc.prepare(one, two, three, both, last)

    def train(acc, one, two, three, both, last, num_steps):
        for number in range(num_steps):
            acc.backward((three(one(torch.ones(4, 2))) + two(torch.ones(4, 2)).sum(1, keepdim=True)).square().mean())
            both.step()
            if number % 2:
                last.step()
            both.zero_grad()
            last.zero_grad()
        return [weights(model) for model in (one, two, three)]

    run = pair()
    train(*run, 3)
    acc, one, *_ = run
    assert acc.prepare(one) is one  # prepared twice, saved once
    path = acc.save_state(tmp_path / "c", blocking=True)
    assert set(open_checkpoint(path).groups) == {"model", "model_1", "model_2", "optimizer", "optimizer_1"}
    whole = train(*run, 3)
    again = pair()
    again[0].load_state(path)
    rest = train(*again, 3)
    assert all(same(one, other) for one, other in zip(whole, rest, strict=True))


# -- loaders ---------------------------------------------------------------------------------------------------------------

LOADERS = {
    "in order": lambda data: DataLoader(data, batch_size=2),
    "shuffled": lambda data: DataLoader(data, batch_size=2, shuffle=True),
    "own generator": lambda data: DataLoader(
        data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "weighted": lambda data: DataLoader(data, 2, sampler=WeightedRandomSampler(torch.arange(1.0, 12.0), 11)),
    "drop_last": lambda data: DataLoader(data, batch_size=2, shuffle=True, drop_last=True),
}


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("loader", LOADERS)
def test_the_rest_of_a_pass_and_the_passes_after_it_are_the_same(loader, epoch, tmp_path):
    def read(acc, loader, stop=None):
        seen = []
        for number in range(loader.epoch, 3):
            for batch in loader:
                seen.append(batch[0][:, 0].tolist())
                if stop == (number, loader.state.batch):
                    acc.save_state(tmp_path / "c")
                    seen.clear()
        return seen

    acc, _, _, prepared = script(loader=LOADERS[loader])
    expected = read(acc, prepared, stop=(epoch, 3))
    acc.end_training()
    other, _, _, resumed = script(loader=LOADERS[loader], seed=9)
    other.load_state(tmp_path / "c")
    assert read(other, resumed) == expected


def test_a_script_of_accelerate_that_skips_batches_itself_does_not_skip_twice(tmp_path):
    acc, _, _, loader = script()
    seen = []
    for epoch in range(2):
        for number, batch in enumerate(loader):
            seen.append(batch[0][:, 0].tolist())
            if (epoch, number) == (1, 2):
                acc.save_state(tmp_path / "step_9", blocking=True)
    other, _, _, loader = script(seed=9)
    other.load_state(str(tmp_path / "step_9"))
    done = 9
    first, skipped = divmod(done, len(loader))
    rest = []
    for epoch in range(first, 2):
        active = skip_first_batches(loader, skipped) if epoch == first else loader
        assert len(active) == len(loader) - skipped
        rest += [batch[0][:, 0].tolist() for batch in active]
    assert rest == seen[done:]
    with pytest.raises(PrepareError, match="not prepared"):
        skip_first_batches([1, 2])


def test_a_script_that_counts_whole_passes_goes_on_with_the_next_one(tmp_path):
    acc, _, _, loader = script()
    seen = []
    for epoch in range(2):
        for number, batch in enumerate(loader):
            seen.append(batch[0][:, 0].tolist())
            if (epoch, number) == (0, len(loader) - 1):
                acc.save_state(tmp_path / "c", blocking=True)
    other, _, _, loader = script(seed=9)
    other.load_state(tmp_path / "c")
    active = other.skip_first_batches(loader, 0)
    assert [batch[0][:, 0].tolist() for batch in active] == seen[len(loader) :]


def test_a_pass_that_was_left_begins_again_after_a_resume_too(tmp_path):
    acc, _, _, loader = script(loader=LOADERS["in order"])
    for _ in loader:
        break
    acc.save_state(tmp_path / "c", blocking=True)
    acc.load_state(tmp_path / "c")
    assert len(list(loader)) == len(loader)


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 4], 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_where_they_were(name, tmp_path):
    def script():
        acc = Accelerator(backend="torch", cpu=True)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(
            [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}], lr=0.05, momentum=0.9
        )
        return acc, *acc.prepare(model, optimizer, SCHEDULES[name](optimizer))

    def rates(acc, model, optimizer, scheduler, num_steps):
        seen = []
        for _ in range(num_steps):
            acc.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        return seen

    run = script()
    rates(*run, 4)
    run[0].save_state(tmp_path / "c", blocking=True)
    expected = rates(*run, 5)
    again = script()
    again[0].load_state(tmp_path / "c")
    assert rates(*again, 5) == expected


def test_a_tensor_learning_rate_keeps_its_tensor(tmp_path):
    acc = Accelerator(backend="torch", cpu=True)
    model = nn.Linear(2, 2)
    rate = torch.tensor(0.5)
    acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=rate))
    acc.save_state(tmp_path / "c", blocking=True)
    rate.fill_(0.1)
    acc.load_state(tmp_path / "c")
    assert rate.item() == 0.5


def test_every_save_is_an_event_of_the_run(tmp_path):
    acc, *_ = script(tmp_path)
    acc.init_trackers("events")
    path = acc.save_state()
    acc.end_training()
    events = [json.loads(line) for line in next((tmp_path / "runs").glob("*/*/events.jsonl")).read_text().splitlines()]
    assert [event["path"] for event in events if event["event"] == "checkpoint"] == [path]
