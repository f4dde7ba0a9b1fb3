"""The conformance suite on the torch engine, in the torch dialect."""

from polyaccel.testing.conformance import Conformance
from polyaccel_torch.dialect.case import TorchCase


class TestTorch(Conformance):
    case = TorchCase("torch")
