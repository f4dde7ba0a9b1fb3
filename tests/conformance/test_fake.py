"""The conformance suite on the backend without a framework: it proves the suite, and the page that shows how to write a backend."""

import pytest

from polyaccel.registry import register_backend
from polyaccel.testing.conformance import Conformance
from polyaccel.testing.fake import FakeBackend, FakeCase, FakeSGD

register_backend(FakeBackend())


class TestFake(Conformance):
    case = FakeCase()


def test_a_broken_engine_fails_the_suite(monkeypatch):
    monkeypatch.setattr(FakeSGD, "step", lambda self: None)
    suite = TestFake()
    suite._open = []
    with pytest.raises(AssertionError):
        suite.test_every_form_of_a_step_gives_the_numbers_of_the_mathematics()
