"""The conformance suite on the xla engine, in the torch dialect."""

from conformance.torch_case import TorchCase

from polyaccel.testing.conformance import Conformance


class TestXla(Conformance):
    case = TorchCase("xla")
