"""On real CUDA devices: pytest --device cuda tests/device. The conformance suite, mixed precision, and both engines' GPT losses."""

import sys
from pathlib import Path

import pytest
import torch

from polyaccel import Accelerator, set_seed
from polyaccel.testing.conformance import Conformance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from byte_gpt import CONTEXT, GPT, next_byte_loss
from conformance.flax_case import FlaxCase

from polyaccel_torch.dialect.case import TorchCase


class OnDevice(Conformance):
    """The suite without `cpu=True`."""

    def accelerator(self, **arguments):
        accelerator = Accelerator(backend=self.case.backend, **arguments)
        self._open.append(accelerator)
        return accelerator


class TorchCudaCase(TorchCase):
    def array(self, values):
        return super().array(values).to("cuda")


class TestTorchOnCuda(OnDevice):
    case = TorchCudaCase("torch")


class TestTorchOnJaxCuda(OnDevice):
    case = TorchCase("jax")


class TestFlaxOnJaxCuda(OnDevice):
    case = FlaxCase("jax")


def gpt_losses(backend, precision, steps=20):
    accelerator = Accelerator(backend=backend, mixed_precision=precision)
    set_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows = torch.randint(0, 256, (steps, 16, CONTEXT + 1))
    model, optimizer = accelerator.prepare(model, optimizer)
    step = accelerator.train_step(next_byte_loss, model, optimizer, max_grad_norm=1.0)
    return [float(step(window.to(accelerator.device))) for window in windows]


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_the_gpt_has_the_same_losses_on_both_engines(precision, tolerance):
    # float32 products on a GPU may run in TF32 on one engine and not on the other; the half types keep 8 to 11 bits.
    assert gpt_losses("jax", precision) == pytest.approx(gpt_losses("torch", precision), rel=tolerance)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_accelerator_stands_on_the_gpu(backend):
    accelerator = Accelerator(backend=backend)
    assert "cpu" not in accelerator.state.device_kind.lower()
