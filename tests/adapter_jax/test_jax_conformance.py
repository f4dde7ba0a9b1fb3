"""The conformance suite on the jax engine, in both dialects."""

from conformance.flax_case import FlaxCase
from conformance.torch_case import TorchCase

from polyaccel.testing.conformance import Conformance


class TestFlaxOnJax(Conformance):
    case = FlaxCase("jax")


class TestTorchOnJax(Conformance):
    case = TorchCase("jax")
