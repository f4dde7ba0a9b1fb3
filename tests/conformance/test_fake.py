"""The conformance suite on the backend without a framework: it proves the suite, and the page that shows how to write a backend."""

import numpy as np
import pytest

from polyaccel.registry import register_backend
from polyaccel.testing.conformance import Conformance
from polyaccel.testing.fake import FakeBackend, FakeLoader, FakeModel, FakeScheduler, FakeSGD

register_backend(FakeBackend())


class FakeCase:
    backend = "fake"

    def model(self, weight, bias):
        return FakeModel(weight, bias)

    def optimizer(self, model, lr):
        return FakeSGD(model, lr)

    def scheduler(self, optimizer, gamma):
        return FakeScheduler(optimizer, gamma)

    def loader(self, x, y, batch_size):
        return FakeLoader({"x": x, "y": y}, batch_size)

    def loss(self, model, batch):
        return model.squared_error(batch["x"], batch["y"])

    def parameters(self, model):
        return model

    def array(self, values):
        return np.asarray(values)

    def weights(self, model):
        return model.params


class TestFake(Conformance):
    case = FakeCase()


def test_a_broken_engine_fails_the_suite(monkeypatch):
    monkeypatch.setattr(FakeSGD, "step", lambda self: None)
    suite = TestFake()
    suite._open = []
    with pytest.raises(AssertionError):
        suite.test_every_form_of_a_step_gives_the_numbers_of_the_mathematics()
