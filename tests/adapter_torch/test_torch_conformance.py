"""The conformance suite on the torch engine, in the torch dialect."""

from conformance.torch_case import TorchCase

from polyaccel.testing.conformance import Conformance


class TestTorch(Conformance):
    case = TorchCase("torch")
