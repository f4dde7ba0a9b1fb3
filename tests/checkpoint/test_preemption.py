"""One process that is signalled, and many that have to agree: threads stand for processes where only the agreement is tested."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest

from polyaccel import Accelerator, preemption
from polyaccel.checkpoint import open_checkpoint
from polyaccel.config.schema import PREEMPTED
from polyaccel.errors import LaunchError
from polyaccel.preemption import Preemption
from polyaccel.registry import register_backend
from polyaccel.store import MemoryStore
from polyaccel.testing.fake import FakeBackend, FakeLoader, FakeModel, FakeSGD
from polyaccel.tracking import list_runs

register_backend(FakeBackend())


LOADER = object()


class Watched:
    """A Preemption of one process, what it did, and a loop that takes steps."""

    def __init__(self, *, loader=LOADER, save=None):
        self.done = []
        self.closes = True
        self.preemption = Preemption(
            MemoryStore,
            process_index=0,
            num_processes=1,
            outermost_loader=lambda: loader,
            closes_window=lambda: self.closes,
            project_dir="project",
            save=save or (lambda: self.done.append("save")),
            leave=lambda: self.done.append("leave"),
        )
        self.preemption.start()

    def step(self):
        self.preemption.before_batch(LOADER)
        self.preemption.after_backward()


@pytest.fixture
def watched():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    made = []

    def make(**options):
        made.append(Watched(**options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.preemption.close()
    for number, handler in zip(preemption.SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", preemption.SIGNALS, ids=lambda number: number.name)
def test_a_signalled_process_ends_its_step_saves_once_and_leaves_with_75(watched, number):
    one = watched()
    one.step()
    signal.raise_signal(number)
    assert one.done == []  # nothing happens inside a step
    with pytest.raises(SystemExit) as left:
        one.step()
    assert left.value.code == PREEMPTED == 75
    assert one.done == ["save", "leave"]


def test_without_a_signal_nothing_happens(watched):
    one = watched()
    for _ in range(3):
        one.step()
    assert one.done == []


def test_a_second_signal_is_harmless_before_during_and_after_the_save(watched):
    def save():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        one.done.append("save")

    one = watched(save=save)
    one.step()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        one.step()
    assert one.done == ["save", "leave"]
    # Until the very end of the process, where Python has taken its own handlers down already.
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == [signal.SIG_IGN, signal.SIG_IGN]


def test_a_signal_before_the_first_update_waits_for_it(watched):
    one = watched()
    signal.raise_signal(signal.SIGTERM)  # while preparing, or compiling
    one.preemption.before_batch(LOADER)
    assert one.done == []
    one.preemption.after_backward()
    with pytest.raises(SystemExit):
        one.preemption.before_batch(LOADER)


def test_an_open_window_is_completed_first(watched):
    one = watched()
    one.step()
    one.closes = False
    one.step()
    signal.raise_signal(signal.SIGTERM)
    one.step()
    assert one.done == []
    one.closes = True
    one.step()
    with pytest.raises(SystemExit):
        one.step()


def test_a_signal_after_the_last_step_lets_the_script_end(watched):
    one = watched()
    one.step()
    signal.raise_signal(signal.SIGTERM)
    one.preemption.close()
    assert one.done == []


def test_inside_a_loader_its_request_for_a_batch_is_the_boundary_and_else_the_call(watched):
    inside, outside = watched(), watched(loader=None)
    for one in (inside, outside):
        one.preemption.after_backward()
    signal.raise_signal(signal.SIGTERM)  # the second has taken the signal, and passes it on to the first
    inside.preemption.before_call()  # the second backward of an iteration: of a GAN, say
    inside.preemption.before_batch(object())  # an evaluation inside the iteration
    assert inside.done == []
    before_batch = partial(inside.preemption.before_batch, LOADER)
    for one, boundary in ((inside, before_batch), (outside, outside.preemption.before_call)):
        with pytest.raises(SystemExit):
            boundary()
        assert one.done == ["save", "leave"]


def test_the_scripts_own_earlier_handler_is_called_and_comes_back(watched):
    seen = []

    def mine(number, frame):
        seen.append(number)

    signal.signal(signal.SIGUSR1, mine)
    one = watched()
    signal.raise_signal(signal.SIGUSR1)
    assert seen == [signal.SIGUSR1]
    one.preemption.close()
    assert signal.getsignal(signal.SIGUSR1) is mine
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    one.preemption.close()  # idempotent


def test_a_handler_that_the_script_installs_later_stays(watched):
    one = watched()

    def mine(number, frame):
        pass

    signal.signal(signal.SIGTERM, mine)
    one.preemption.close()
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_forked_child_dies_of_the_signal_as_it_would_without(watched):
    watched()
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_off_the_main_thread_no_handler_is_installed_and_that_is_said(caplog):
    before = signal.getsignal(signal.SIGTERM)
    made = []
    thread = threading.Thread(target=lambda: made.append(Watched()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "not on the main thread" in caplog.text
    made[0].preemption.close()


def test_a_failed_save_is_the_scripts_to_see(watched):
    def save():
        raise OSError("no space")

    one = watched(save=save)
    one.step()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(OSError, match="no space"):
        one.step()
    assert one.done == []


# -- several processes -----------------------------------------------------------------------------------------------------


class Job:
    """Processes as threads that take steps together: each step ends when all have begun it, as with an all-reduce."""

    def __init__(self, monkeypatch, num_processes, *, runs_ahead=0):
        monkeypatch.setattr(preemption, "POLL_S", 0.01)
        monkeypatch.setattr(preemption, "_ANSWER_POLL_S", 0.001)
        self.store = MemoryStore()
        self.saved = {}
        self.begun = [0] * num_processes
        self._runs_ahead = runs_ahead
        self.members = [self._member(index, num_processes) for index in range(num_processes)]

    def _member(self, index, num_processes):
        member = Preemption(
            lambda: self.store,
            process_index=index,
            num_processes=num_processes,
            outermost_loader=lambda: LOADER,
            closes_window=lambda: True,
            project_dir="project",
            save=lambda: self.saved.setdefault(index, self.begun[index]),
            leave=lambda: None,
        )
        member._prefix = "job"  # one counter per process gives them the same
        return member

    def signal(self, index):
        self.members[index]._notice("SIGTERM")

    def run(self, num_steps, pause):
        """Every member trains; returns their exit codes (None: trained to the end)."""
        codes = [None] * len(self.members)

        def train(index):
            member = self.members[index]
            member.start()  # off the main thread: signals come through `signal`
            try:
                for _ in range(num_steps):
                    member.before_batch(LOADER)
                    self.begun[index] += 1
                    end = time.monotonic() + 20
                    while min(self.begun) < self.begun[index] - self._runs_ahead:
                        assert time.monotonic() < end, "the others do not come to this step"
                        time.sleep(0.0002)
                    time.sleep(pause())
                    member.after_backward()
                member.before_batch(LOADER)
            except SystemExit as left:
                codes[index] = left.code
            member.close()

        threads = [threading.Thread(target=train, args=(index,)) for index in range(len(self.members))]
        for thread in threads:
            thread.start()
        return threads, codes


@pytest.mark.parametrize("seed", range(8))
def test_whoever_is_signalled_whenever_all_save_the_same_step(monkeypatch, seed):
    draw = random.Random(seed)
    job = Job(monkeypatch, 3, runs_ahead=seed % 3)
    threads, codes = job.run(2000, lambda: draw.random() * 1e-3)
    time.sleep(draw.random() * 0.2)
    for index in draw.sample(range(3), draw.choice([1, 1, 2])):
        job.signal(index)
        time.sleep(draw.random() * 0.01)
    for thread in threads:
        thread.join(30)
    assert codes == [PREEMPTED] * 3
    assert len(set(job.saved.values())) == 1
    assert 0 < job.saved[0] < 2000


@pytest.mark.parametrize("seed", range(4))
def test_signals_around_the_last_step_end_with_all_or_none(monkeypatch, seed):
    draw = random.Random(100 + seed)
    job = Job(monkeypatch, 3)
    threads, codes = job.run(50, lambda: 1e-3)
    while max(job.begun) < 49 + seed % 2:
        time.sleep(0.0002)
    time.sleep(draw.random() * 0.003)
    job.signal(seed % 3)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert codes in ([PREEMPTED] * 3, [None] * 3)
    assert len(set(job.saved.values())) <= 1


def test_a_process_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(preemption, "_ANSWER_TIMEOUT_S", 0.05)
    job = Job(monkeypatch, 2)
    (alone, _) = job.members
    thread = threading.Thread(target=alone.start)
    thread.start()
    thread.join()
    job.signal(0)
    alone.after_backward()
    time.sleep(0.05)
    with pytest.raises(LaunchError, match="process 1 did not say"):
        alone.before_batch(LOADER)
    alone.close()


def test_a_job_that_can_no_longer_be_reached_trains_on(monkeypatch):
    class Gone(MemoryStore):
        def get(self, key):
            raise RuntimeError("connection reset")

    job = Job(monkeypatch, 2)
    job.store = Gone()
    (alone, _) = job.members
    thread = threading.Thread(target=alone.start)
    thread.start()
    thread.join()
    job.signal(0)
    time.sleep(0.05)
    for _ in range(3):
        alone.after_backward()
        alone.before_batch(LOADER)
    assert job.saved == {}
    alone.close()


# -- through the facade ------------------------------------------------------------------------------------------------------


def test_the_setting_off_installs_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    accelerator = Accelerator(backend="fake", project_dir=tmp_path)
    loader = accelerator.prepare(FakeLoader({"x": np.zeros((4, 2))}, 2))
    assert accelerator._preemption is None
    assert loader.before_batch == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_place_to_save_to_that_is_said_at_the_start(caplog):
    accelerator = Accelerator(backend="fake", preemption="save")
    assert "project_dir" in caplog.text
    accelerator.end_training()


@pytest.fixture
def accelerator(tmp_path):
    made = Accelerator(backend="fake", preemption="save", project_dir=tmp_path)
    yield made
    made.end_training()
    for number in preemption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def tiny():
    data = {"x": np.ones((8, 2), np.float32), "y": np.ones((8, 1), np.float32)}
    model = FakeModel(np.zeros((2, 1)), np.zeros(1))
    return model, FakeSGD(model, 0.1), FakeLoader(data, 2)


def squared(model, batch):
    return model.squared_error(batch["x"], batch["y"])


@pytest.mark.parametrize("form", ["value", "function", "train_step", "accumulate"])
def test_every_form_of_a_step_leaves_before_the_next_batch(accelerator, form):
    saved = []
    accelerator.save_state = lambda **options: saved.append(options)
    model, optimizer, loader = accelerator.prepare(*tiny())
    step = accelerator.train_step(squared, model, optimizer)
    taken = 0
    with pytest.raises(SystemExit):  # noqa: PT012 - the loop is what a user writes
        for batch in loader:
            taken += 1
            if taken == 2:
                signal.raise_signal(signal.SIGTERM)
            if form == "train_step":
                step(batch)
                continue
            with accelerator.accumulate(model):
                if form == "function":
                    accelerator.backward(squared, model, batch)
                else:
                    accelerator.backward(squared(model, batch))
                optimizer.step()
                optimizer.zero_grad()
    assert taken == 2
    assert saved == [{"blocking": True}]


class Noted:
    """A registered object whose state is asked for in the middle of a save."""

    def __init__(self, during_save):
        self.during_save = during_save

    def state_dict(self):
        self.during_save()
        return {}

    def load_state_dict(self, state):
        pass


def test_a_signal_in_the_middle_of_a_save_lets_it_finish_and_the_next_step_is_saved(accelerator, tmp_path):
    signals = [signal.SIGTERM, signal.SIGUSR1]
    accelerator.register_for_checkpointing(Noted(lambda: signals and signal.raise_signal(signals.pop())))
    model, optimizer, loader = accelerator.prepare(*tiny())
    step = accelerator.train_step(squared, model, optimizer)
    with pytest.raises(SystemExit) as left:  # noqa: PT012 - the loop is what a user writes
        for batch in loader:
            step(batch)
            accelerator.save_state()  # and its writer is at work while the signal is handled
    assert left.value.code == PREEMPTED
    assert signals == []
    for name in ("checkpoint_0", "checkpoint_1"):
        assert open_checkpoint(tmp_path / "checkpoints" / name).shared["iteration"]


def test_a_run_that_left_goes_on_with_the_next_batch(tmp_path):
    def run(folder, signalled_at=None):
        """Losses of two passes of four batches, and how the run ended."""
        accelerator = Accelerator(backend="fake", preemption="save", project_dir=folder)
        model, optimizer, loader = accelerator.prepare(*tiny())
        if accelerator.has_checkpoint:
            accelerator.load_state()
        losses, code = [], None
        try:
            for _ in range(loader.state.epoch, 2):
                for batch in loader:
                    losses.append(float(accelerator.backward(squared, model, batch)))
                    optimizer.step()
                    optimizer.zero_grad()
                    if len(losses) == signalled_at:
                        signal.raise_signal(signal.SIGTERM)
        except SystemExit as left:
            code = left.code
        accelerator.end_training()
        for number in preemption.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        return losses, code

    whole, code = run(tmp_path / "whole")
    assert (len(whole), code) == (8, None)
    for cut in (1, 4, 7):  # in the first batch, at the end of a pass, near the end
        folder = tmp_path / str(cut)
        first, code = run(folder, signalled_at=cut)
        assert (first, code) == (whole[:cut], PREEMPTED)
        assert run(folder) == (whole[cut:], None)


def test_a_step_costs_less_than_a_microsecond(accelerator):
    loader = accelerator.prepare(tiny()[2])
    batches = iter(loader)
    next(batches)
    before_batch, after_backward = accelerator._preemption.before_batch, accelerator._preemption.after_backward

    def cost_s():
        start = time.perf_counter()
        for _ in range(10_000):
            before_batch(loader)
            after_backward()
        return (time.perf_counter() - start) / 10_000

    assert min(cost_s() for _ in range(20)) < 1e-6
    assert accelerator._preemption._num_boundaries > 100_000  # each of them was one


def test_an_evaluation_inside_a_step_belongs_to_it(accelerator):
    model, optimizer, loader = accelerator.prepare(*tiny())
    evaluation = accelerator.prepare(tiny()[2])
    step = accelerator.train_step(squared, model, optimizer)
    evaluated = []
    with pytest.raises(SystemExit):  # noqa: PT012 - the loop is what a user writes
        for batch in loader:
            step(batch)
            signal.raise_signal(signal.SIGTERM)
            evaluated.append([float(squared(model, one)) for one in evaluation])
    assert len(evaluated) == 1  # to its end, and then the next batch was asked for
    assert loader.state.epoch == 0


def test_two_loaders_that_run_side_by_side_are_both_at_the_same_batch(accelerator, tmp_path):
    model, optimizer, one, other = accelerator.prepare(*tiny(), tiny()[2])
    taken = 0
    with pytest.raises(SystemExit):  # noqa: PT012 - the loop is what a user writes
        for batch, _ in zip(one, other, strict=True):
            taken += 1
            accelerator.backward(squared, model, batch)
            optimizer.step()
            optimizer.zero_grad()
            signal.raise_signal(signal.SIGTERM)
    saved = open_checkpoint(tmp_path / "checkpoints" / "checkpoint_0").shared["loaders"]
    assert [state["batch"] for state in saved] == [taken, taken] == [1, 1]


def test_a_run_that_left_says_so_and_its_trackers_do_not_keep_it(accelerator, tmp_path):
    model, optimizer, loader = accelerator.prepare(*tiny())
    step = accelerator.train_step(squared, model, optimizer)
    with pytest.raises(SystemExit):  # noqa: PT012 - the loop is what a user writes
        for batch in loader:
            accelerator.log({"loss": step(batch)})
            signal.raise_signal(signal.SIGTERM)
    (run,) = list_runs(tmp_path / "runs")
    assert run.status == "preempted"
    assert accelerator.project_configuration.tracker_finish_timeout_s == preemption.TRACKERS_S


def test_a_signal_in_the_last_step_is_no_reason_to_come_back(accelerator):
    model, optimizer, loader = accelerator.prepare(*tiny())
    step = accelerator.train_step(squared, model, optimizer)
    batches = iter(loader)
    step(next(batches))
    signal.raise_signal(signal.SIGTERM)
    accelerator.end_training()  # nothing was asked for after that step
    assert not accelerator.has_checkpoint


def test_a_loop_without_a_prepared_loader_leaves_at_its_next_step(accelerator):
    saved = []
    accelerator.save_state = lambda **options: saved.append(options)
    model, optimizer, loader = tiny()
    model, optimizer = accelerator.prepare(model, optimizer)
    step = accelerator.train_step(squared, model, optimizer)
    batch = {name: array[:2] for name, array in loader.arrays.items()}
    step(batch)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        step(batch)
    assert saved == [{"blocking": True}]
    assert accelerator._preemption._num_boundaries == 1


def test_evaluation_between_epochs_is_no_step(accelerator):
    accelerator.save_state = lambda **options: None
    model, optimizer, loader = accelerator.prepare(*tiny())
    evaluation = accelerator.prepare(tiny()[2])
    step = accelerator.train_step(squared, model, optimizer)
    for batch in loader:
        step(batch)
    for _ in evaluation:
        pass
    assert accelerator._preemption._num_boundaries == 4
