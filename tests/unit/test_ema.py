"""Averages of parameters, as far as they need no framework: the decay, misuse, and states that do not fit."""

import numpy as np
import pytest

from polyaccel import EMA, Accelerator
from polyaccel.errors import CheckpointError, ConfigError, PrepareError, UnsupportedError
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend, FakeModel

register_backend(FakeBackend())


@pytest.fixture
def model():
    accelerator = Accelerator(backend="fake")  # in use until the test ends, as in a script
    yield accelerator.prepare(FakeModel([[4.0]], [2.0]))
    accelerator.end_training()


def test_a_model_whose_accelerator_is_gone_is_refused():
    model = Accelerator(backend="fake").prepare(FakeModel([[4.0]], [2.0]))
    with pytest.raises(PrepareError, match="keep the Accelerator"):
        EMA(model)


def moved(model, value):
    model.params["weight"] = np.full((1, 1), value, np.float32)


def test_a_decay_of_a_half_goes_half_of_the_way(model):
    ema = EMA(model, decay=0.5)
    moved(model, 8.0)
    ema.update()
    assert ema.state_dict()["averages"]["weight"].tolist() == [[6.0]]
    ema.update()
    assert ema.state_dict()["averages"]["weight"].tolist() == [[7.0]]


def test_with_warmup_the_first_update_keeps_two_elevenths(model):
    ema = EMA(model, decay=0.999, warmup=True)
    moved(model, 0.0)
    ema.update()
    np.testing.assert_allclose(ema.state_dict()["averages"]["weight"], 4 * 2 / 11, rtol=1e-6)


def test_the_parameters_come_back_after_an_exception(model):
    ema = EMA(model, decay=0.5)
    moved(model, 8.0)

    def evaluate():
        with ema.applied():
            raise RuntimeError(model.params["weight"].item())

    with pytest.raises(RuntimeError, match=r"4\.0"):
        evaluate()
    assert model.params["weight"].item() == 8.0
    ema.update()  # the block is left


def test_updates_and_blocks_inside_a_block_are_refused(model):
    ema = EMA(model)
    with ema.applied():
        with pytest.raises(UnsupportedError, match=r"ema.update\(\) was called inside"):
            ema.update()
        with pytest.raises(UnsupportedError, match="entered inside itself"), ema.applied():
            pass


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay, model):
    with pytest.raises(ConfigError, match="decay="):
        EMA(model, decay=decay)


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(PrepareError, match="a FakeModel, is not a prepared model"):
        EMA(FakeModel([[1.0]], [1.0]))


def test_a_model_prepared_twice_belongs_to_the_newest_accelerator():
    model = FakeModel([[4.0]], [2.0])
    first, second = Accelerator(backend="fake"), Accelerator(backend="fake", gradient_accumulation_steps=2)
    first.prepare(model)
    ema = EMA(second.prepare(model))
    second.gradient_state.advance()
    ema.update()
    assert ema.num_updates == 0  # the second one accumulates


@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, model):
    ema = EMA(model)
    state = ema.state_dict()
    if change == "missing":
        del state["averages"]["bias"]
    elif change == "unknown":
        state["averages"]["b"] = np.zeros(1)
    else:
        state["averages"]["bias"] = np.zeros(3)
    state["averages"]["weight"] = np.zeros((1, 1))
    with pytest.raises(CheckpointError, match="the averages do not fit the model: 'b"):
        ema.load_state_dict(state)
    assert ema.state_dict()["averages"]["weight"].item() == 4.0
