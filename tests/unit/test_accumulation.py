"""Accelerate's accumulation rules, without an engine."""

import numpy as np
import pytest

from polyaccel import Accelerator
from polyaccel.accumulation import GradientState, SchedulerGate
from polyaccel.errors import UnsupportedError
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend, FakeLoader

register_backend(FakeBackend())


class Loader:
    def __init__(self, state, length):
        self.state, self.length, self.end_of_dataloader, self.remainder = state, length, False, -1

    def __iter__(self):
        self.state.loader_started(self)
        try:
            for index in range(self.length):
                self.end_of_dataloader = index == self.length - 1
                yield index
        finally:
            self.state.loader_finished(self)


def pattern(state, length):
    loader = Loader(state, length)
    return [state.advance() for _ in loader], state.step


def test_six_batches_in_windows_of_four_sync_at_the_fourth_and_the_last():
    state = GradientState(4)
    assert pattern(state, 6) == ([False, False, False, True, False, True], 0)
    assert pattern(state, 6)[0] == [False, False, False, True, False, True]  # a new epoch starts a fresh window


def test_outside_a_loader_only_the_window_counts():
    state = GradientState(2)
    assert [state.advance() for _ in range(4)] == [False, True, False, True]


def test_gradients_sync_when_nothing_accumulates():
    assert GradientState(4).sync_gradients


def test_the_innermost_loader_is_the_active_one():
    state = GradientState(1)
    outer, inner = Loader(state, 2), Loader(state, 1)
    for _ in outer:
        assert state.active_dataloader is outer
        for _ in inner:
            assert state.active_dataloader is inner
        assert state.active_dataloader is outer
    assert state.active_dataloader is None
    assert not state.end_of_dataloader


def test_two_states_do_not_know_each_other():
    one, two = GradientState(2), GradientState(1)
    one.advance()
    assert not one.sync_gradients
    assert two.sync_gradients


def test_a_second_accelerator_leaves_the_windows_of_the_first_alone():
    # rule G9: in Accelerate it resets the first one's gradient_accumulation_steps
    first = Accelerator(backend="fake", gradient_accumulation_steps=4)
    with first.accumulate():
        pass
    second = Accelerator(backend="fake")
    assert (first.gradient_accumulation_steps, second.gradient_accumulation_steps) == (4, 1)
    assert (first.sync_gradients, second.sync_gradients) == (False, True)
    loader = second.prepare(FakeLoader({"x": np.zeros((2, 1))}, 1))
    for _ in loader:
        with first.accumulate(), second.accumulate():
            assert second.sync_gradients
    assert first.gradient_state.step == 3  # the end of a loader of the second one closes no window of the first
    first.gradient_accumulation_steps = 2
    assert second.gradient_accumulation_steps == 1


def windows(state, length):
    """Per batch the true size of the window that it closes, as far as gradients have to be scaled by it."""
    return [state.tail_factor for _ in Loader(state, length) if state.advance()]


def test_a_short_window_knows_what_its_gradients_lack():
    state = GradientState(4, scales_tail=True)
    assert windows(state, 6) == [1.0, 2.0]  # four batches, and two that were divided by four
    assert windows(state, 5) == [1.0, 4.0]
    assert windows(state, 8) == [1.0, 1.0]
    assert windows(state, 1) == [4.0]
    assert windows(GradientState(4), 6) == [1.0, 1.0]  # Accelerate's rule G4


def test_two_weighted_backwards_in_one_open_micro_batch_are_refused():
    state = GradientState(2)
    state.advance()
    state.note_weighted()
    state.window_weights = 1.0
    with pytest.raises(UnsupportedError, match="two weighted backward calls in one micro batch"):
        state.note_weighted()
    state.advance()
    state.note_weighted()
    state.note_weighted()  # in the one that closes the window: without accumulate every batch is one


class Scheduler:
    def __init__(self, total_steps=None):
        self.calls, self._step_count = 0, 1
        if total_steps:
            self.total_steps = total_steps

    def step(self):
        self.calls += 1
        self._step_count += 1


class Optimizer:
    step_was_skipped = False


def test_a_scheduler_waits_for_real_updates_and_skips_skipped_ones():
    state, scheduler, optimizer = GradientState(2), Scheduler(), Optimizer()
    gate = SchedulerGate(scheduler, [optimizer], state, steps_per_update=3, follows_optimizer=True)
    state.advance()
    gate.step()
    assert scheduler.calls == 0
    state.advance()
    gate.step()
    assert scheduler.calls == 3
    optimizer.step_was_skipped = True
    gate.step()
    assert scheduler.calls == 3


def test_a_scheduler_with_an_end_does_not_pass_it():
    scheduler = Scheduler(total_steps=4)
    gate = SchedulerGate(scheduler, [], GradientState(1), steps_per_update=3, follows_optimizer=True)
    for _ in range(3):
        gate.step()
    assert scheduler._step_count == 5  # torch counts from one: four steps were taken


def test_a_free_scheduler_steps_at_every_call():
    state, scheduler = GradientState(2), Scheduler()
    gate = SchedulerGate(scheduler, [], state, steps_per_update=3, follows_optimizer=False)
    state.advance()
    gate.step()
    assert scheduler.calls == 1
