"""On real CUDA devices: pytest --device cuda tests/device. Flax models on the torch engine share memory with torch's parameters."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from polyaccel import Accelerator
from polyaccel_bridges.flax_to_torch import torch_module

_random = np.random.default_rng(0)
BATCH = {"x": _random.normal(size=(8, 16)).astype(np.float32), "y": _random.integers(0, 3, 8).astype(np.int32)}


class MLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body, self.head = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


def run(form, **arguments):
    accelerator = Accelerator(backend="torch", **arguments)
    model = MLP()
    model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param))
    step = accelerator.train_step(loss_fn, model, optimizer)
    batch = {name: jnp.asarray(value) for name, value in BATCH.items()}
    losses = []
    for _ in range(20):
        if form == "fused":
            losses.append(float(step(batch)))
            continue
        losses.append(float(accelerator.backward(loss_fn, model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return torch_module(model), losses


@pytest.mark.parametrize("form", ["fused", "calls"])
def test_programs_read_torchs_memory_on_the_gpu_and_train_as_on_the_cpu(form):
    module, losses = run(form)
    held = module.held
    for name, array in zip(held.names, held.leaves(held.names), strict=True):
        parameter = module.get_parameter(name)
        assert parameter.is_cuda
        assert array.unsafe_buffer_pointer() == parameter.data_ptr(), name
        assert not array.is_deleted()
    # Products may run in TF32 on the GPU, which keeps 10 bits of mantissa.
    np.testing.assert_allclose(losses, run(form, cpu=True)[1], rtol=1e-2)
