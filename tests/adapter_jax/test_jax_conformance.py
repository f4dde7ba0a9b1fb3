"""The conformance suite on the jax engine, in both dialects."""

from conformance.flax_case import FlaxCase

from polyaccel.testing.conformance import Conformance
from polyaccel_torch.dialect.case import TorchCase


class TestFlaxOnJax(Conformance):
    case = FlaxCase("jax")


class TestTorchOnJax(Conformance):
    case = TorchCase("jax")
