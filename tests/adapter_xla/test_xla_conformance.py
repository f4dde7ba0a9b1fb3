"""The conformance suite on the xla engine, in the torch dialect."""

from polyaccel.testing.conformance import Conformance
from polyaccel_torch.dialect.case import TorchCase


class TestXla(Conformance):
    case = TorchCase("xla")
