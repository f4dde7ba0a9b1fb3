"""The conformance suite on the torch engine, in the flax dialect."""

from conformance.flax_case import FlaxCase

from polyaccel.testing.conformance import Conformance


class TestFlaxOnTorch(Conformance):
    case = FlaxCase("torch")
