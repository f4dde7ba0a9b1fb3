"""State of Flax models on the torch engine: Flax's own names, random keys and counters, and the way to the jax engine and back.

Also where the memory is: torch's parameters are what the programs read, without a copy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax_parity_models import NnxCNN, batches, loss_of, make_model

from polyaccel import Accelerator, set_seed
from polyaccel.errors import CheckpointError, PrepareError
from polyaccel_bridges.flax_to_torch import torch_module

TOLERANCE = 1e-5  # the same float32 mathematics in other programs


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def transformation():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mu_dtype=jnp.bfloat16))


class Run:
    """A model with BatchNorm and dropout and its optimizer on one engine, of one data shard each."""

    def __init__(self, backend, seed=0, model=None, **arguments):
        set_seed(seed)
        self.accelerator = Accelerator(backend=backend, cpu=True, **arguments)
        model = NnxCNN(nnx.Rngs(seed), dropout=0.5) if model is None else model
        optimizer = nnx.Optimizer(model, transformation(), wrt=nnx.Param) if isinstance(model, nnx.Module) else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer or transformation())
        self.engine = self.accelerator._engine

    def handle(self, role):
        return self.accelerator._prepared.handle_of(getattr(self, role), role, argument=role)

    def read(self):
        return {role: list(self.engine.read_state(self.handle(role))) for role in ("model", "optimizer")}

    def write(self, state):
        for role, shards in state.items():
            self.engine.write_state(self.handle(role), shards)

    def train(self, data, library="nnx"):
        losses = []
        for batch in data:
            losses.append(float(self.accelerator.backward(loss_of(library), self.model, batch)))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses


def arrays(shards):
    return {shard.name: np.asarray(shard.data) for shard in shards}


def test_the_names_are_flaxs_own_and_random_keys_and_counters_are_among_them():
    run = Run("torch")
    run.train(batches("cnn")[:3])
    state = run.read()
    model = arrays(state["model"])
    assert set(model) == {
        "conv.kernel",
        "norm.scale",
        "norm.bias",
        "norm.mean",
        "norm.var",
        "head.kernel",
        "head.bias",
        "dropout.rngs.key",
        "dropout.rngs.count",
    }
    assert model["dropout.rngs.key"].dtype == np.uint32
    assert model["dropout.rngs.count"] == 3
    slots = {name for name in arrays(state["optimizer"]) if name.startswith("head.kernel.")}
    assert slots == {"head.kernel.1/0/mu", "head.kernel.1/0/nu"}
    assert arrays(state["optimizer"])["1/0/count"] == 3


@pytest.mark.parametrize(("first", "second"), [("jax", "torch"), ("torch", "jax")])
def test_a_state_goes_to_the_other_engine_and_back(first, second):
    data = batches("cnn")
    run, other = Run(first), Run(second, seed=7)
    run.train(data[:5])
    saved = run.read()
    other.write(saved)
    crossed = other.read()
    for role, shards in saved.items():
        given, got = arrays(shards), arrays(crossed[role])
        assert given.keys() == got.keys()
        for name, value in given.items():
            assert np.array_equal(
                value.view(np.uint16) if value.dtype == jnp.bfloat16 else value,
                got[name].view(np.uint16) if got[name].dtype == jnp.bfloat16 else got[name],
            ), name
    expected = run.train(data[5:8])
    other.train(data[5:8])
    back = Run(first, seed=9)
    back.write(crossed)
    assert back.train(data[5:8]) == expected


def test_a_resumed_run_drops_the_neurons_that_the_uninterrupted_one_drops():
    data = batches("cnn")
    run = Run("torch")
    run.train(data[:4])
    saved = run.read()
    expected = run.train(data[4:8])
    resumed = Run("torch", seed=5)
    resumed.write(saved)
    assert resumed.train(data[4:8]) == expected
    without = {"model": [shard for shard in saved["model"] if shard.name != "dropout.rngs.key"]}
    with pytest.raises(CheckpointError, match=r"missing: dropout\.rngs\.key"):
        resumed.write(without)


def test_linen_state_crosses_with_its_collections():
    data = batches("cnn")
    run, other = (Run(backend, model=make_model("linen", "cnn")) for backend in ("torch", "jax"))
    run.train(data[:5], "linen")
    state = run.read()
    names = set(arrays(state["model"]))
    assert {"Dense_0.kernel", "batch_stats.BatchNorm_0.mean"} <= names
    assert "Dense_0.kernel.1/0/mu" in arrays(state["optimizer"])
    other.write(state)
    np.testing.assert_allclose(other.train(data[5:8], "linen"), run.train(data[5:8], "linen"), rtol=TOLERANCE)


def test_the_state_of_a_masked_transformation_is_named_by_parameter():
    labels = {"mlp": nnx.Param}
    model = make_model("nnx", "mlp")
    adam_for_head = optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params))
    accelerator = Accelerator(backend="torch", cpu=True)
    model, optimizer = accelerator.prepare(model, nnx.Optimizer(model, adam_for_head, wrt=labels["mlp"]))
    shards = accelerator._engine.read_state(
        accelerator._prepared.handle_of(optimizer, "optimizer", argument="optimizer")
    )
    names = set(arrays(shards))
    assert {"head.kernel.inner_state/0/mu", "body.kernel.inner_state/0/nu", "inner_state/0/count"} <= names
    assert not any(name.startswith("head.bias.") for name in names)


def test_programs_read_torchs_own_memory_and_gradients_are_xlas():
    run = Run("torch", model=make_model("nnx", "mlp"))
    module = torch_module(run.model)
    held = module.held
    run.train(batches("mlp")[:3])
    addresses = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    for name, array in zip(held.names, held.leaves(held.names), strict=True):
        assert array.unsafe_buffer_pointer() == addresses[name], name
    given = []
    compute = held.engine.run

    def noting(*args, **kwargs):
        outcome = compute(*args, **kwargs)
        given.append({name: grad.unsafe_buffer_pointer() for name, grad in outcome.grads.items()})
        return outcome

    held.engine.run = noting
    run.accelerator.backward(loss_of("nnx"), run.model, batches("mlp")[3])
    for name, parameter in module.named_parameters():
        assert parameter.grad.data_ptr() == given[0][f"{held.name}.{name}"], name
    del held.engine.run
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.train(batches("mlp")[4:6])
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == addresses


def test_no_program_deletes_a_parameter_that_torch_holds():
    run = Run("torch", model=make_model("nnx", "mlp"))
    held = torch_module(run.model).held
    step = run.accelerator.train_step(loss_of("nnx"), run.model, run.optimizer)
    before = held.leaves(held.names)
    step(batches("mlp")[0])
    run.train(batches("mlp")[1:3])
    assert not any(array.is_deleted() for array in before)


def test_the_torch_module_of_something_else_is_refused():
    with pytest.raises(PrepareError, match="Linear has no torch parameters"):
        torch_module(torch.nn.Linear(1, 1))
    accelerator = Accelerator(backend="jax", cpu=True)
    with pytest.raises(PrepareError, match="backend='torch'"):
        torch_module(accelerator.prepare(make_model("nnx", "mlp")))
